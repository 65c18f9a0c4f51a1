"""What the end of a request had to wait for: a chain of spans from its end back to its beginning.

As in the analysis of parallel programs (Yang and Miller, *Critical path analysis for the execution of parallel and
distributed programs*, 1988): from the end backwards, a lane is followed as long as it worked without a gap; where it
had been waiting, the chain goes on with the lane that was busy just then, or until last.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from edge_runtime.profiling.result import CriticalPath, PathPart
from edge_runtime.tracing.trace import Span, Trace

UNTOLD = "nothing told"
"""The part of time in which no lane said what it did."""


class Link(NamedTuple):
    """A span, or the piece of it that counts. Nanoseconds, as :class:`Span`."""

    part: str
    lane: str
    start: int
    end: int


def chain(trace: Trace) -> list[Link]:
    """In order, without gaps, from the beginning of a trace that has ended to its end."""
    lanes = _Lanes(list(trace))
    at, lane = trace.started + trace.wall, ""
    links: list[Link] = []
    while at > trace.started:
        span = lanes.before(at, lane)
        end = trace.started if span is None else max(min(span.end, at), trace.started)
        if end < at:
            links.append(Link(UNTOLD, "", end, at))
        if span is None or end == trace.started:
            break
        links.append(Link(span.name, span.lane, max(span.start, trace.started), end))
        at, lane = span.start, span.lane
    return links[::-1]


def critical_path(trace: Trace, request: str) -> CriticalPath:
    """The chain, by lane and part."""
    took: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for link in chain(trace):
        took[link.part, link.lane].append(link.end - link.start)
    wall = max(trace.wall, 1)
    parts = [
        PathPart(part, lane, sum(times) / 1e6, sum(times) / wall, len(times)) for (part, lane), times in took.items()
    ]
    return CriticalPath(request, trace.wall / 1e6, sorted(parts, key=lambda each: -each.ms))


class _Lanes:
    """Spans by lane; within one they follow each other."""

    def __init__(self, spans: Sequence[Span]) -> None:
        by_name: defaultdict[str, list[Span]] = defaultdict(list)
        for span in spans:
            if span.end > span.start:
                by_name[span.lane].append(span)
        self._spans = {name: sorted(each, key=lambda span: span.start) for name, each in by_name.items()}
        self._starts = {name: [span.start for span in each] for name, each in self._spans.items()}

    def before(self, at: int, lane: str) -> Span | None:
        """What was done just before ``at``: by ``lane`` itself, if it was, else by the lane that was busy last; of
        several, what began last."""
        found = []
        for name, starts in self._starts.items():
            place = bisect_left(starts, at)
            if place:
                span = self._spans[name][place - 1]
                if name == lane and span.end == at:
                    return span
                found.append(span)
        return max(found, key=lambda span: (min(span.end, at), span.start), default=None)
