"""A result to show and compare, with round numbers."""

from __future__ import annotations

from typing import Any

from edge_runtime.bench.result import Copying, Machine, Percentiles, Result, Samples, SharedPrefix, Shares

MACHINE = Machine(
    cpu="Some <CPU>",
    cores=2,
    memory_bytes=8 << 30,
    os="Linux",
    python="3.11.0",
    load_average=0.5,
    versions={"edge-glm": "0.1.0", "numpy": "2.0"},
)


def make_result(**changes: Any) -> Result:
    fields: dict[str, Any] = {
        "created": "2026-01-02T03:04:05+00:00",
        "model": "tiny & co",
        "device": "onnxruntime:cpu",
        "weights": "int4",
        "prompt_tokens": 512,
        "new_tokens": 64,
        "concurrency": 1,
        "requests": 5,
        "seed": 0,
        "prefill_tps": 1000.0,
        "decode_tps": 100.0,
        "ttft_ms": Percentiles(500.0, 600.0, 700.0),
        "tpot_ms": Percentiles(10.0, 11.0, 12.0),
        "itl_ms": Percentiles(9.0, 11.0, 13.0),
        "load_s": 0.5,
        "start_s": 1.0,
        "peak_rss_bytes": 256 << 20,
        "shares": Shares(0.9, 0.04, 0.06),
        "shared_prefix": SharedPrefix(2000, 1984, 2000.0, 50.0, 40.0),
        "copying": Copying(3, 2, 100.0, 300.0, 3.0, 0.95),
        "nll": 3.25,
        "nll_tokens": 1000,
        "samples": Samples([480.0, 500.0, 700.0], [9.0, 10.0, 12.0], [(2, 9.0), (3, 10.0), (4, 11.0)]),
        "machine": MACHINE,
    }
    return Result(**{**fields, **changes})
