"""Flame charts of requests and of engine calls, as data."""

from __future__ import annotations

from collections import defaultdict

from devices import profiling
from edge_runtime.profiling.critical_path import chain
from edge_runtime.profiling.result import Bar, Chart, Row
from edge_runtime.tracing.trace import Trace

MOST_BARS = 20_000
"""Of a row; an answer of a thousand tokens has some ten thousand."""


def request_chart(trace: Trace, name: str) -> Chart:
    """The request, its critical path, and what each lane did."""
    rows: defaultdict[str, list[Bar]] = defaultdict(list)
    rows["request"] = [Bar("request", 0.0, trace.wall / 1e3)]
    rows["critical path"] = [
        Bar(link.part, (link.start - trace.started) / 1e3, (link.end - link.start) / 1e3) for link in chain(trace)
    ]
    for span in trace:
        if span.end > span.start:
            rows[span.lane].append(Bar(span.name, (span.start - trace.started) / 1e3, (span.end - span.start) / 1e3))
    return Chart(name, trace.wall / 1e3, [_row(lane, bars) for lane, bars in rows.items()])


def _row(name: str, bars: list[Bar]) -> Row:
    told = name if len(bars) <= MOST_BARS else f"{name}, the first {MOST_BARS:,} of {len(bars):,}"
    return Row(told, bars[:MOST_BARS])


def call_chart(phase: profiling.Phase) -> Chart | None:
    """The operators of a call that took as long as most; None where the engine does not tell when they ran."""
    if not phase.typical_call:
        return None
    bars = [Bar(each.kind, each.start * 1e6, each.seconds * 1e6) for each in phase.typical_call]
    named = [Bar(each.name, each.start * 1e6, each.seconds * 1e6) for each in phase.typical_call]
    length = max(bar.start + bar.length for bar in bars)
    what = "a decode step" if phase.name == "decode" else "a chunk of a prompt"
    whole = Row("call", [Bar(phase.name, 0.0, length)])
    return Chart(f"operators of {what}", length, [whole, Row("operator", bars), Row("node", named)])
