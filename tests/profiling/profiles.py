"""A profile to show, with round numbers, and traces made by hand."""

from __future__ import annotations

from typing import Any

from edge_runtime.profiling.charts import request_chart
from edge_runtime.profiling.critical_path import critical_path
from edge_runtime.profiling.parts import part_times, spread
from edge_runtime.profiling.result import (
    Bar,
    Chart,
    Limits,
    Memory,
    OperatorGroup,
    Phase,
    Profile,
    Result,
    Row,
    Usage,
)
from edge_runtime.tracing.trace import Part, Trace
from tests.benchmarking.results import MACHINE

MS = 1_000_000


def make_trace(wall: int, **lanes: list[tuple[Part, int, int]]) -> Trace:
    """Of ``wall`` milliseconds; each lane has (part, from, to), in milliseconds from the beginning."""
    trace = Trace()
    for number, (name, spans) in enumerate(lanes.items()):
        trace.lane(name)
        for part, start, end in spans:
            trace.add(number, part, trace.started + start * MS, trace.started + end * MS)
    trace.ended = trace.started + wall * MS
    return trace


def two_lanes(decode: int = 4) -> Trace:
    """A caller that waits for the engine, twice, and does something at the end by itself."""
    engine: list[tuple[Part, int, int]] = [
        ("queue", 2, 5),
        ("prefill", 5, 15),
        ("sample", 15, 16),
        ("detokenize", 16, 18),  # the caller is woken in the middle of it
        ("decode", 18, 18 + decode),
        ("sample", 18 + decode, 19 + decode),
    ]
    caller: list[tuple[Part, int, int]] = [
        ("tokenize", 0, 2),
        ("deliver", 17, 19),
        ("other", 19, 20),
        ("deliver", 19 + decode, 21 + decode),
        ("other", 21 + decode, 24 + decode),
    ]
    return make_trace(24 + decode, caller=caller, engine=engine)


def make_profile(**changes: Any) -> Profile:
    traces = [two_lanes(4), two_lanes(5), two_lanes(20)]
    groups = [
        OperatorGroup("QuantizedMatMul", "576 → 3072", 30, 2.0, 0.5, 0.61, 0.02),
        OperatorGroup("Some <Attention>", "", 30, 1.0, 0.25, 0.1, 0.05),
        *(OperatorGroup(f"Kind{place}", "", 1, 0.01, 0.0025, None, None) for place in range(9)),
    ]
    fields: dict[str, Any] = {
        "created": "2026-01-02T03:04:05+00:00",
        "model": "tiny & co",
        "device": "edge:cpu",
        "weights": "int4",
        "tuned": None,
        "prompt_tokens": 512,
        "new_tokens": 64,
        "concurrency": 1,
        "requests": 3,
        "seed": 0,
        "covered": 0.995,
        "wall_ms": spread([28.0, 29.0, 44.0]),
        "ttft_ms": spread([17.0, 18.0, 19.0]),
        "tpot_ms": spread([4.0, 5.0, 6.0]),
        "parts": part_times(traces),
        "critical_paths": [critical_path(traces[1], "median"), critical_path(traces[2], "P95")],
        "phases": [
            Phase("prefill", 2, 256, 150.0, 148.0, 147.0, groups),
            Phase("decode", 32, 1, 4.0, None, 3.9, groups[:1]),
        ],
        "no_operators": None,
        "limits": Limits(50e9, 250e9, 2000e9),
        "usage": [Usage("open", 0.5, 0.6, 0.1, 10, 2, 5000, 0), Usage("requests", 2.0, 4.0, 0.0, 100, None, 7, None)],
        "memory": Memory(
            samples=[(0.0, 60 << 20), (1.0, 150 << 20), (2.5, 170 << 20)],
            marks=[(0.0, "open"), (0.5, "warm up"), (0.6, "requests"), (2.4, "close")],
            peak=170 << 20,
            budget=256 << 20,
            asked=True,
            planned={"base": 80 << 20, "weights": 90 << 20, "KV cache": 5 << 20, "activations": 4 << 20},
            planned_full=200 << 20,
        ),
        "machine": MACHINE,
    }
    operators = Chart("operators <of> a step", 900.0, [Row("operator", [Bar("</script>", 0.0, 400.0)])])
    charts = [request_chart(traces[1], "the median request"), operators]
    return Profile(Result(**{**fields, **changes}), charts)
