"""A profile, for people at a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from edge_runtime.bench.table import machine_lines
from edge_runtime.columns import columns
from edge_runtime.memory import format_bytes
from edge_runtime.profiling.result import CriticalPath, Limits, Memory, Phase, Result, Spread, Usage

MOST_GROUPS = 8
"""Of operators."""
_QUIET = 0.1
"""Of the cores: what others may use without a word."""
_CACHED = 1.05
"""Of what the memory gives: beyond what measuring that may be off by."""
_COUNTS = ("voluntary context switches", "involuntary context switches", "minor faults", "major faults")
MOST_LINKS = 6
"""Of a critical path, where it is told in a line."""
_LEAST_PART = 0.0005
"""Of wall time; parts with less are told together."""


def table(result: Result) -> str:
    sections = [
        [title(result), conditions(result)],
        [columns(parts(result), "lr", head=True), covered(result)],
        *([path_line(path) for path in result.critical_paths],),
        *([phase_line(phase), columns(groups(phase), "llr", head=True)] for phase in result.phases),
        [f"no operators: {result.no_operators}"] if result.no_operators else [limits_line(result.limits)],
        [columns(usage(result.usage), "lr", head=True), *contention(result)],
        list(memory_lines(result.memory)),
        machine_lines(result.machine),
    ]
    return "\n\n".join("\n".join(section) for section in sections)


def title(result: Result) -> str:
    return f"{result.model} {result.weights} on {result.device}"


def conditions(result: Result) -> str:
    streams = "one at a time" if result.concurrency == 1 else f"{result.concurrency} at once"
    tuned = "" if result.tuned is None else f", {result.tuned}"
    return (
        f"{result.requests} requests of {result.prompt_tokens} prompt and {result.new_tokens} new tokens, {streams}, "
        f"seed {result.seed}{tuned}"
    )


def parts(result: Result) -> list[list[str]]:
    """Of latency."""
    rows = [["ms", "P50", "P95", "P99", "IQR", "of wall", "critical"]]
    rows += [
        [each.part, *spread_cells(each.ms), f"{each.share:.1%}", f"{each.critical:.1%}"]
        for each in result.parts
        if each.share >= _LEAST_PART
    ]
    small = [each for each in result.parts if each.share < _LEAST_PART]
    if small:
        share, critical = (sum(getattr(each, name) for each in small) for name in ("share", "critical"))
        rows.append([f"{len(small)} smaller", "", "", "", "", f"{share:.1%}", f"{critical:.1%}"])
    for name, spread in (
        ("whole request", result.wall_ms),
        ("first token", result.ttft_ms),
        ("a token then", result.tpot_ms),
    ):
        rows.append([name, *spread_cells(spread), "", ""])
    return rows


def covered(result: Result) -> str:
    return (
        f"spans cover {result.covered:.1%} of each request's time at least; lanes overlap, so that shares may make "
        "more than 100%, those of the critical path do not"
    )


def spread_cells(spread: Spread) -> list[str]:
    return [number(value) for value in (spread.p50, spread.p95, spread.p99, spread.iqr)]


def number(value: float) -> str:
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 2 if abs(value) >= 1 else 3
    return f"{value:,.{digits}f}"


def path_line(path: CriticalPath) -> str:
    told = [f"{each.part} {each.share:.1%} ({each.lane or '-'}, {each.links}×)" for each in path.parts]
    shown = ", ".join(told[:MOST_LINKS]) + (f", and {len(told) - MOST_LINKS} more" if len(told) > MOST_LINKS else "")
    return f"{path_title(path)}: {shown}"


def path_title(path: CriticalPath) -> str:
    return f"Critical path, {path.request} request of {number(path.wall_ms)} ms"


def path_rows(path: CriticalPath) -> list[list[str]]:
    rows = [["part", "by", "ms", "of wall", "stretches"]]
    return rows + [
        [each.part, each.lane or "-", number(each.ms), f"{each.share:.1%}", str(each.links)] for each in path.parts
    ]


def phase_line(phase: Phase) -> str:
    plain = "" if phase.plain_ms is None else f" ({number(phase.plain_ms)} ms with nothing counted)"
    calls = "1 call" if phase.calls == 1 else f"{phase.calls} calls"
    tokens = "1 token" if phase.tokens == 1 else f"{phase.tokens} tokens"
    return (
        f"{phase.name}: {calls} of {tokens}, {number(phase.ms)} ms each{plain}, "
        f"{phase.operators_ms / phase.ms:.1%} of it in operators"
    )


def groups(phase: Phase) -> list[list[str]]:
    """The hottest, and the rest as one."""
    rows = [["operator", "size", "count", "ms", "of time", "of bandwidth", "of arithmetic"]]
    shown = phase.groups[:MOST_GROUPS]
    for each in shown:
        shares = [_of_bandwidth(each.of_bandwidth), percent(each.of_arithmetic)]
        rows.append([each.kind, each.shape, str(each.operators), number(each.ms), f"{each.share:.1%}", *shares])
    rest = phase.groups[MOST_GROUPS:]
    if rest:
        count, ms, share = (sum(getattr(each, name) for each in rest) for name in ("operators", "ms", "share"))
        rows.append([f"{len(rest)} more kinds", "", str(count), number(ms), f"{share:.1%}", "", ""])
    return rows


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _of_bandwidth(share: float | None) -> str:
    return "cached" if share is not None and share > _CACHED else percent(share)


def limits_line(limits: Limits) -> str:
    integer = limits.integer_operations
    told = "" if integer is None else f", {integer / 1e9:,.0f} G integer operations/s (8 bits, for quantized weights)"
    memory = "" if limits.bytes is None else f"{limits.bytes / 1e9:.1f} GB/s of memory, "
    untold = "; too little memory was free to measure its bandwidth" if limits.bytes is None else ""
    return (
        f"of at most {memory}{limits.float_operations / 1e9:,.0f} G float operations/s"
        f"{told}{untold or '; of bytes asked for, activations aside; cached: faster than the memory gives'}"
    )


def usage(found: list[Usage]) -> list[list[str]]:
    """Of the process, and of others."""
    head = ["while", "s", "cores", "others' cores", *_COUNTS]
    rows = [head]
    for each in found:
        wall = max(each.wall_s, 1e-9)
        counts = (each.voluntary_switches, each.involuntary_switches, each.minor_faults, each.major_faults)
        told = ["-" if count is None else f"{count:,}" for count in counts]
        rows.append(
            [each.name, number(each.wall_s), f"{each.cpu_s / wall:.2f}", f"{each.other_cpu_s / wall:.2f}", *told]
        )
    return rows


def contention(result: Result) -> Iterator[str]:
    """Said where others had much of the processor while requests ran."""
    requests = result.usage[-1]
    others = requests.other_cpu_s / max(requests.wall_s, 1e-9)
    if others > _QUIET * result.machine.cores:
        yield (
            f"others had {others:.1f} of {result.machine.cores} cores while requests ran: these are times of a shared "
            "machine"
        )


def memory_lines(memory: Memory) -> Iterator[str]:
    told = f"peak memory {format_bytes(memory.peak)}"
    if memory.planned:
        planned = ", ".join(f"{name} {format_bytes(nbytes)}" for name, nbytes in memory.planned.items())
        told += f" of {format_bytes(sum(memory.planned.values()))} planned for this work ({planned})"
    yield told
    if memory.budget is not None:
        kind = "budget" if memory.asked else "no budget was given; at most"
        full = "" if memory.planned_full is None else f", {format_bytes(memory.planned_full)} with a full KV cache"
        yield f"{kind} {format_bytes(memory.budget)}{full}"
