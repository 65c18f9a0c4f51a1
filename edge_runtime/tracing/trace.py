"""The spans of one request.

A request is worked on by several threads at a time: while the engine decodes a token, the event loop serialises the one
before. Each of them has a :class:`Lane`, in which time is never counted twice: :meth:`Lane.mark` says what the lane has
done since its last mark, so that its spans follow each other without gaps. A lane that waits for another is paused.
"""

from __future__ import annotations

import secrets
import time
from array import array
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextvars import ContextVar, Token
from threading import Lock
from typing import Literal, NamedTuple, get_args

import numpy as np

Part = Literal[
    "other",  # parsing, changes of threads, whatever has no name of its own
    "receive",  # the body comes
    "load",  # the model is opened, or another is closed for it
    "route",  # a tier is chosen
    "template",
    "tokenize",
    "queue",  # until there is a place and room in the KV cache
    "prefix lookup",  # and restoring it from the disk
    "schedule",  # what the engine does between two steps
    "prefill",  # a chunk of the prompt
    "decode",  # a step, with whatever else is in its batch
    "sample",
    "detokenize",  # and stop strings, calls of tools
    "batch",  # the others of a step are sampled
    "wait",  # a step without this request: another prompt's chunk comes first
    "embed",
    "judge",  # whether a local answer is good enough
    "deliver",  # from the engine's thread to the reader
    "upstream",  # a tier elsewhere
    "serialize",
    "send",  # to the client
]
PARTS: tuple[Part, ...] = get_args(Part)
TIER = "tier "
"""What the lane of a tier's answer is called before its name."""
_NUMBER = {part: number for number, part in enumerate(PARTS)}

MOST_SPANS = 50_000
"""Of one request; of an answer with more only sums are kept from there on."""
_FIELDS = 4
_ALL = -1


class Span(NamedTuple):
    """Times in nanoseconds of :func:`time.perf_counter_ns`."""

    part: Part
    lane: str
    start: int
    end: int

    @property
    def name(self) -> str:
        """The part; of a tier elsewhere, which one: ``upstream NAME``."""
        return _name(self.part, self.lane)


class Trace:
    """One request, from its first byte to its last. Spans may come from any thread.

    ``id``: 32 hexadecimal digits, as W3C's Trace Context has them; ``parent``: 16, of the caller's span; ``sampled``:
    the caller wants it sent where such traces are gathered.
    """

    def __init__(self, id: str | None = None, parent: str | None = None, sampled: bool = True) -> None:
        self.id = id or secrets.token_hex(16)
        self.parent = parent
        self.sampled = sampled
        self.about: dict[str, str | int | float] = {}
        """Of the request: model, path, status, tier, tokens. No content."""
        self.unix_ns = time.time_ns()
        self.started = time.perf_counter_ns()
        self.ended: int | None = None
        self.put_at: int | None = None
        """When the newest chunk was passed on to the reader."""
        self._lanes: list[_Told] = []
        self._opening = Lock()
        """Of lanes: several threads may want one at once."""
        self._spans = array("q")
        """(lane, part, start, end) each, extended whole: one call of C, so that threads need no lock."""
        self._sums: dict[str, int] | None = None
        """Of a thin one, :attr:`parts`."""
        self._covered = (0, 0.0)
        """By how many spans, and what it was then; once they are gone by :data:`_ALL`."""

    def lane(self, name: str, start: int | None = None) -> Lane:
        """A new one; ``start``: when what it marks first has begun, if not now."""
        with self._opening:
            lanes = self._lanes
            lanes.append(_Told(name, defaultdict(int)))
            number = len(lanes) - 1
        return Lane(self, number, time.perf_counter_ns() if start is None else start)

    def add(self, lane: int, part: Part, start: int, end: int) -> None:
        """Of what a thread was still doing when the trace ended, what came before that counts."""
        if self.ended is not None:
            if start >= self.ended:
                return
            end = min(end, self.ended)
        spans, lanes = self._spans, self._lanes  # in this order: with lanes, they are not a thin one's
        if not lanes:  # it is thin
            return
        lanes[lane].sums[part] += end - start
        if len(spans) < _FIELDS * MOST_SPANS:
            spans.extend((lane, _NUMBER[part], start, end))

    def say(self, **about: str | int | float) -> None:
        """See :attr:`about`."""
        self.about.update(about)

    def finish(self) -> None:
        """Idempotent."""
        if self.ended is None:
            self.ended = time.perf_counter_ns()

    def thin(self) -> None:
        """Of one that has ended: let the spans go, and keep their sums. Other threads may be adding or reading."""
        self._covered = _ALL, self.covered
        self._sums = dict(self.parts())
        self._lanes = []
        self._spans = array("q")

    # --- read ---------------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Spans."""
        return len(self._spans) // _FIELDS

    def __iter__(self) -> Iterator[Span]:
        spans, lanes = self._spans, self._lanes
        if not lanes:  # it is thin, or about to be
            return
        fields = iter(spans[: len(spans) // _FIELDS * _FIELDS])
        for lane, part, start, end in zip(fields, fields, fields, fields, strict=True):
            yield Span(PARTS[part], lanes[lane].name, start, end)

    @property
    def wall(self) -> int:
        """Nanoseconds, until now while it runs."""
        return (time.perf_counter_ns() if self.ended is None else self.ended) - self.started

    def parts(self) -> Mapping[str, int]:
        """Nanoseconds of each, in the order of :data:`PARTS`; of tiers elsewhere one by one, as ``upstream NAME``.
        Lanes overlap, so that they may add up to more than :attr:`wall`."""
        lanes, thin = list(self._lanes), self._sums  # in this order: without the ones there are the others
        if thin is not None:
            return thin
        sums: dict[tuple[Part, str], int] = {}
        for lane in lanes:
            for part, took in list(lane.sums.items()):
                key = part, _name(part, lane.name)
                sums[key] = sums.get(key, 0) + took
        return {name: sums[part, name] for part, name in sorted(sums, key=lambda each: _NUMBER[each[0]])}

    @property
    def covered(self) -> float:
        """The share of :attr:`wall` in which at least one lane said what it did, 0..1."""
        known, share = self._covered
        if known in (len(self), _ALL):
            return share
        spans = np.frombuffer(self._spans[:], np.int64).reshape(-1, _FIELDS)  # of a copy: this one must be free to grow
        spans = spans[np.argsort(spans[:, 2], kind="stable")]
        starts, ends = spans[:, 2], spans[:, 3]
        reached = np.maximum.accumulate(np.concatenate(([self.started], ends)))[:-1]
        union = int(np.maximum(ends - np.maximum(starts, reached), 0).sum())
        full = len(spans) >= MOST_SPANS
        not_kept = sum(self.parts().values()) - int((ends - starts).sum()) if full else 0
        share = min((union + not_kept) / max(self.wall, 1), 1.0)
        if self.ended is not None:
            self._covered = len(spans), share
        return share


class _Told(NamedTuple):
    """What a lane has said."""

    name: str
    sums: defaultdict[Part, int]
    """Nanoseconds, of spans that are not kept, too. A lane is one thread's at a time, so that none is lost."""


def _name(part: Part, lane: str) -> str:
    return f"upstream {lane.removeprefix(TIER)}" if part == "upstream" else part


class Lane:
    """What one thread, or one coroutine, does for a request. Of one thread at a time."""

    __slots__ = ("_last", "_number", "_part", "_paused", "_stepped", "trace")

    def __init__(self, trace: Trace, number: int, start: int) -> None:
        self.trace = trace
        self._number = number
        self._last = start
        self._part: Part = "other"
        self._paused = False
        self._stepped = False

    def mark(self, part: Part, now: int | None = None) -> None:
        """Since the last mark it was ``part``; or else paused, and goes on."""
        if now is None:
            now = time.perf_counter_ns()
        if not self._paused:
            self.trace.add(self._number, part, self._last, now)
        self._paused = False
        self._last = now

    def begin(self, part: Part) -> Part:
        """What is done from now on is ``part``; returns what it was until now, for :meth:`end`."""
        self.mark(self._part)
        before, self._part = self._part, part
        return before

    def end(self, before: Part) -> None:
        self.mark(self._part)
        self._part = before

    def pause(self) -> None:
        """What follows is another lane's, until :meth:`resume`, or else until this one says something again."""
        if not self._paused:
            self.mark(self._part)
            self._paused = True

    def resume(self) -> None:
        self._paused = False
        self._last = time.perf_counter_ns()

    def delivered(self) -> None:
        """The reader has got a chunk: from when it was passed on, or else was looked for, until now it was on its
        way."""
        put_at = self.trace.put_at
        now = time.perf_counter_ns()  # later: the engine may be putting the next one
        if put_at is not None:
            self.trace.add(self._number, "deliver", max(put_at, self._last), now)
        self._paused = False
        self._last = now

    # --- of a step of the engine --------------------------------------------------------------------------------------

    def stepped(self, part: Part, start: int, end: int) -> None:
        """It was part of the engine's step from ``start`` to ``end``."""
        self.mark("schedule", start)
        self.mark(part, end)
        self._stepped = True

    def step_over(self, now: int) -> None:
        """The engine's step has ended, with or without it."""
        self.mark("batch" if self._stepped else "wait", now)
        self._stepped = False


_current: ContextVar[Lane | None] = ContextVar("edge_glm_lane", default=None)


def current() -> Lane | None:
    """The lane of whoever runs here; None: nobody wants to know, or not any more."""
    lane = _current.get()
    return None if lane is None or lane.trace.ended is not None else lane


def enter(lane: Lane | None) -> Token[Lane | None]:
    """What runs here from now on, and what it starts, runs in ``lane``; :func:`leave` ends that."""
    return _current.set(lane)


def leave(token: Token[Lane | None]) -> None:
    _current.reset(token)


class span:
    """``with span("template"):`` what is done inside is that, in the lane that runs here, if there is one."""

    __slots__ = ("_before", "_lane", "_part")

    def __init__(self, part: Part) -> None:
        self._part: Part = part
        self._lane: Lane | None = None
        self._before: Part = "other"

    def __enter__(self) -> None:
        self._lane = current()
        if self._lane is not None:
            self._before = self._lane.begin(self._part)

    def __exit__(self, *exception: object) -> None:
        if self._lane is not None:
            self._lane.end(self._before)


__all__ = ["MOST_SPANS", "PARTS", "TIER", "Lane", "Part", "Span", "Trace", "current", "enter", "leave", "span"]
