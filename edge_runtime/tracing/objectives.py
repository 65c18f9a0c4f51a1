"""Which requests met the latency that their class wants, and why the others did not: the report on service level
objectives (Beyer et al., Site Reliability Engineering, 2016, chapter 4).

A request counts if its class has a target and it was answered or failed; one that was refused, or whose client left,
does not. It is a miss by its first token or else by its whole answer; the reason is what took most of the time until
then.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from edge_runtime.tracing.trace import Trace

Reason = Literal[
    "failed",  # there was no whole answer
    "fell back",  # the tier that should have answered did not
    "queue",  # others came first
    "load",  # the model had to be opened
    "prompt",  # was long: template, tokens, prefill
    "elsewhere",  # a tier elsewhere was slow
    "held back",  # until the first words were judged
    "decoding",  # the answer was long, or its tokens slow
    "other",
]
REASONS: tuple[Reason, ...] = get_args(Reason)
MET = "met"
_KINDS: Mapping[str, Reason] = {
    "queue": "queue",
    "wait": "queue",
    "batch": "queue",
    "load": "load",
    "template": "prompt",
    "tokenize": "prompt",
    "prefix lookup": "prompt",
    "prefill": "prompt",
    "upstream": "elsewhere",
    "judge": "held back",
    "decode": "decoding",
    "sample": "decoding",
    "detokenize": "decoding",
}
"""Part → what it counts for; others count for ``other``."""
MOST_CLASSES = 200
"""A policy that is changed again and again could bring ever new names."""
MOST_MISSES = 100


@dataclass
class _Class:
    ttft_ms: float | None = None
    total_ms: float | None = None
    outcomes: Counter[str] = field(default_factory=Counter)


class Objectives:
    """A sink of :class:`~edge_runtime.tracing.recorder.Recorder`. Any thread may read.

    Goes by what a trace says of itself: ``task``, ``tier``, ``outcome`` (``whole``, ``failed``, ``refused``, ``left``),
    ``ttft_ms``, ``wanted_ttft_ms``, ``wanted_total_ms``, ``degraded``.
    """

    def __init__(self, count: Callable[[str, str], None] = lambda task, outcome: None) -> None:
        """``count``: hears of each request that counts; its class, and :data:`MET` or why not."""
        self._count = count
        self._lock = threading.Lock()
        self._classes: dict[str, _Class] = {}
        self._misses: deque[dict[str, Any]] = deque(maxlen=MOST_MISSES)

    def __call__(self, trace: Trace) -> None:
        about = trace.about
        task, outcome = str(about.get("task", "")), about.get("outcome")
        ttft, total = _number(about, "wanted_ttft_ms"), _number(about, "wanted_total_ms")
        if outcome not in ("whole", "failed") or (ttft is None and total is None):
            return
        first, all_of_it = _number(about, "ttft_ms"), trace.wall / 1e6
        late = ttft is not None and (all_of_it if first is None else first) > ttft  # an answer may be empty
        reason: Reason | None = None
        times: Mapping[Reason, float] = {}
        if outcome == "failed" or late or (total is not None and all_of_it > total):
            times = phases(trace, first if late else None)
            reason = "failed" if outcome == "failed" else why(times, bool(about.get("degraded")), answered=not late)
        with self._lock:
            if task not in self._classes and len(self._classes) >= MOST_CLASSES:
                return
            known = self._classes.setdefault(task, _Class())
            known.ttft_ms, known.total_ms = ttft, total  # as the policy has it now
            known.outcomes[MET if reason is None else reason] += 1
            if reason is not None:
                self._misses.append(_miss(trace, reason, first, times))
        self._count(task, MET if reason is None else reason)

    def report(self) -> dict[str, Any]:
        """For JSON; times in milliseconds, the newest misses first."""
        with self._lock:
            classes = [_told(name, known) for name, known in self._classes.items()]
            return {"classes": classes, "misses": list(reversed(self._misses))}


def phases(trace: Trace, until_ms: float | None = None) -> dict[Reason, float]:
    """Milliseconds by what they count for, from the start of the request until ``until_ms`` after it, or its end."""
    found: dict[Reason, float] = {}
    if until_ms is None:
        for part, nanoseconds in trace.parts().items():
            kind = _kind(part)
            found[kind] = found.get(kind, 0.0) + nanoseconds / 1e6
        return found
    until = trace.started + until_ms * 1e6
    for span in trace:
        took = (min(span.end, until) - span.start) / 1e6
        if took > 0:
            kind = _kind(span.part)
            found[kind] = found.get(kind, 0.0) + took
    return found


def _kind(part: str) -> Reason:
    """``part``: as :meth:`Trace.parts` calls it, tiers elsewhere one by one."""
    return _KINDS.get("upstream" if part.startswith("upstream ") else part, "other")


def why(times: Mapping[Reason, float], degraded: bool, answered: bool) -> Reason:
    """What took longest. ``answered``: the first token had left, else decoding was for judging what it says."""
    if degraded:
        return "fell back"
    longest: Reason = max(times, key=lambda kind: times[kind], default="other")
    return "held back" if longest == "decoding" and not answered else longest


def _miss(trace: Trace, reason: Reason, first: float | None, times: Mapping[Reason, float]) -> dict[str, Any]:
    about = trace.about
    return {
        "id": trace.id,
        "started": trace.unix_ns / 1e9,
        "class": about.get("task", ""),
        "tier": about.get("tier", ""),
        "reason": reason,
        "ttft_ms": None if first is None else round(first, 1),
        "total_ms": round(trace.wall / 1e6, 1),
        "prompt_tokens": about.get("prompt_tokens"),
        "completion_tokens": about.get("completion_tokens"),
        "spent_ms": {kind: round(took, 1) for kind, took in times.items()},
    }


def _told(name: str, known: _Class) -> dict[str, Any]:
    requests = known.outcomes.total()
    met = known.outcomes[MET]
    return {
        "class": name,
        "wanted_ttft_ms": known.ttft_ms,
        "wanted_total_ms": known.total_ms,
        "requests": requests,
        "met": met,
        "share": met / requests,
        "missed": {reason: known.outcomes[reason] for reason in REASONS if known.outcomes[reason]},
    }


def _number(about: Mapping[str, str | int | float], name: str) -> float | None:
    value = about.get(name)
    return float(value) if isinstance(value, int | float) else None
