"""Traces in Chrome's trace event format (JSON object form), which Perfetto (ui.perfetto.dev) shows.

Google, Trace Event Format, 2016: complete events ("X") with times in microseconds. A request is a process there, each
of its lanes a thread.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from edge_runtime.tracing.trace import Trace


def chrome_trace(traces: Iterable[Trace]) -> dict[str, Any]:
    """For ``json.dump``."""
    events: list[dict[str, Any]] = []
    ordered = sorted(traces, key=lambda trace: trace.unix_ns)
    origin = ordered[0].unix_ns if ordered else 0  # microseconds since 1970 would leave quarters of one
    for process, trace in enumerate(ordered, start=1):
        name = " ".join(str(trace.about[key]) for key in ("path", "model") if key in trace.about) or "request"
        events.append(_named("process_name", process, 0, f"{name} {trace.id[:8]}"))
        lanes: dict[str, int] = {}
        offset = trace.unix_ns - origin - trace.started
        events.append(
            {
                "name": "request",
                "ph": "X",
                "pid": process,
                "tid": 0,
                "ts": (trace.unix_ns - origin) / 1e3,
                "dur": trace.wall / 1e3,
                "args": {"trace": trace.id, **trace.about},
            }
        )
        for span in trace:
            if span.lane not in lanes:
                lanes[span.lane] = len(lanes) + 1
                events.append(_named("thread_name", process, lanes[span.lane], span.lane))
            events.append(
                {
                    "name": span.part,
                    "ph": "X",
                    "pid": process,
                    "tid": lanes[span.lane],
                    "ts": (span.start + offset) / 1e3,
                    "dur": (span.end - span.start) / 1e3,
                }
            )
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"started": origin / 1e9}}


def _named(what: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}
