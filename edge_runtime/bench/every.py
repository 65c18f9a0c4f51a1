"""Every device that ``auto`` may choose here, measured under each workload, side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from edge_runtime.bench.job import Job
from edge_runtime.bench.result import Result
from edge_runtime.columns import columns
from edge_runtime.errors import ConfigError, EdgeError
from edge_runtime.measurements import LONG, WORKLOADS, Measurement, Shape, Workload

Found = dict[str, dict[Workload, Result | str]]
"""Device → workload → its result, or why there is none."""
_STREAMS = 8
_NEW = 32
"""Tokens after a long prompt."""


def shapes(job: Job) -> dict[Workload, Shape]:
    """Of each workload: ``job``'s own with one stream and with many, and one with a long prompt."""
    return {
        "one": Shape(min(job.prompt_tokens, (LONG - 1) * job.new_tokens), job.new_tokens, 1),
        "many": Shape(job.prompt_tokens, job.new_tokens, max(job.concurrency, _STREAMS)),
        "long": Shape(max(4 * job.prompt_tokens, LONG * _NEW), _NEW, 1),
    }


def measurement(result: Result, machine: str) -> Measurement:
    """What a result here says about its device."""
    assert result.device is not None
    assert result.weights is not None
    assert result.prefill_tps is not None
    assert result.decode_tps is not None
    seconds = result.prompt_tokens / result.prefill_tps + result.new_tokens / result.decode_tps
    shape = Shape(result.prompt_tokens, result.new_tokens, result.concurrency)
    return Measurement(result.model, result.device, result.weights, shape, seconds, machine, result.nll)


def measure(job: Job, devices: Sequence[str], run: Callable[[Job], Result], keep: Callable[[Result], None]) -> Found:
    """``keep`` gets each result as it comes. ConfigError if there is none at all.

    The devices take turns under each workload, so that what drifts on the machine meets all of them.
    """
    found: Found = {device: {} for device in devices}
    for workload, shape in shapes(job).items():
        for device in devices:
            one = msgspec.structs.replace(job, device=device, nll=False, **msgspec.structs.asdict(shape))
            one = msgspec.structs.replace(one, timing=job.timing and workload == "one")  # it says as much for all
            try:
                result = run(one)
            except EdgeError as error:
                found[device][workload] = str(error)
            else:
                keep(result)
                found[device][workload] = result
    if not any(isinstance(each, Result) for by_workload in found.values() for each in by_workload.values()):
        reasons = "; ".join(f"{device}: {next(iter(each.values()))}" for device, each in found.items())
        raise ConfigError(f"no device could be measured: {reasons}")
    return found


def every_table(job: Job, found: Found, kept: bool) -> str:
    """Seconds of each request, the fastest of each workload marked, and its rates. ``kept``: ``auto`` goes by them."""
    lines = ["seconds for each request: prefill and decoding at the rates of all streams together", ""]
    lines += [
        f"{workload:5} {shape.prompt_tokens} prompt tokens, {shape.new_tokens} new, {shape.concurrency} at once"
        for workload, shape in shapes(job).items()
    ]
    rows = [["", *WORKLOADS]]
    best = {workload: _fastest(found, workload) for workload in WORKLOADS}
    problems = []
    for device, results in found.items():
        cells = [device]
        for workload in WORKLOADS:
            result = results[workload]
            if isinstance(result, str):
                problems.append(f"{device}, {workload}: {result}")
                cells.append("-")
                continue
            if result.untimed is not None:
                problems.append(f"{device}, single requests were not timed: {result.untimed}")
            mark = "*" if best[workload] == device else " "
            rates = f"({result.prefill_tps:,.0f}, {result.decode_tps:,.0f})"
            cells.append(f"{_seconds(result):.2f} s {rates}{mark}")
        rows.append(cells)
    use = "what auto takes for such work from now on" if kept else "the fastest"
    lines += ["", columns(rows, head=True), "", f"in brackets tokens/s of prefill and decoding; * is {use}"]
    return "\n".join([*lines, *problems])


def _fastest(found: Found, workload: Workload) -> str | None:
    times = {
        device: _seconds(result) for device, results in found.items() if isinstance(result := results[workload], Result)
    }
    return min(times, key=lambda device: times[device], default=None)


def _seconds(result: Result) -> float:
    return measurement(result, "").seconds
