"""Latency by parts, over requests."""

from __future__ import annotations

import statistics
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from edge_runtime.profiling.critical_path import UNTOLD, chain
from edge_runtime.profiling.result import PartTimes, Spread
from edge_runtime.tracing.trace import PARTS, Span, Trace


def spread(samples: Sequence[float]) -> Spread:
    """Of one sample or more."""
    low, p50, high, p95, p99 = np.percentile(np.asarray(samples, np.float64), (25, 50, 75, 95, 99)).tolist()
    return Spread(p50, p95, p99, high - low)


def part_times(traces: Sequence[Trace]) -> list[PartTimes]:
    """Of traces that have ended. A request that lacks a part spent 0 on it."""
    wall = sum(trace.wall for trace in traces)
    told = [trace.parts() for trace in traces]
    critical: defaultdict[str, int] = defaultdict(int)
    for trace in traces:
        for link in chain(trace):
            critical[link.part] += link.end - link.start
    found = []
    for part in sorted({name: None for each in told for name in each}, key=_place):
        times = [each.get(part, 0) for each in told]
        ms = spread([nanoseconds / 1e6 for nanoseconds in times])
        found.append(PartTimes(part, ms, sum(times) / wall, critical[part] / wall))
    if critical[UNTOLD]:
        untold = [sum(link.end - link.start for link in chain(trace) if link.part == UNTOLD) / 1e6 for trace in traces]
        share = critical[UNTOLD] / wall
        found.append(PartTimes(UNTOLD, spread(untold), share, share))
    return found


def step_ms(traces: Sequence[Trace], part: str) -> float | None:
    """Of a step that did ``part``, on average over a request, of which the median is taken. Steps in which a chunk of
    another request's prompt was computed, too, do not count; None: there were no others."""
    chunks = sorted(
        (span.start, span.end, place) for place, trace in enumerate(traces) for span in trace if span.part == "prefill"
    )
    starts = [start for start, _, _ in chunks]

    def beside_a_prompt(span: Span, place: int) -> bool:
        middle = (span.start + span.end) // 2
        before = bisect_right(starts, middle) - 1  # an engine computes one chunk at a time
        return before >= 0 and middle < chunks[before][1] and chunks[before][2] != place

    found = []
    for place, trace in enumerate(traces):
        times = [span.end - span.start for span in trace if span.part == part and not beside_a_prompt(span, place)]
        if times:
            found.append(statistics.mean(times) / 1e6)
    return statistics.median(found) if found else None


def _place(name: str) -> int:
    """Among :data:`PARTS`, of a name as :attr:`edge_runtime.tracing.trace.Span.name` gives it."""
    return next(place for place, part in enumerate(PARTS) if name == part or name.startswith(f"{part} "))
