"""A result, for people at a terminal."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from edge_runtime.bench.compare import ARROWS, Comparison
from edge_runtime.bench.metrics import METRICS
from edge_runtime.bench.result import Machine, Result
from edge_runtime.memory import format_bytes


def table(result: Result, comparison: Comparison | None = None) -> str:
    lines = [
        title(result),
        conditions(result),
        "",
        *_rows(result),
        "",
        *machine_lines(result.machine, measured_from(result)),
    ]
    if comparison is not None:
        lines += ["", *_ratios(comparison)]
    return "\n".join(lines)


def title(result: Result) -> str:
    weights = f" {result.weights}" if result.weights else ""
    return f"{result.model}{weights} on {result.device or result.url}"


def conditions(result: Result) -> str:
    streams = "1 stream" if result.concurrency == 1 else f"{result.concurrency} streams at once"
    shape = f"{result.prompt_tokens} prompt tokens, {result.new_tokens} new tokens"
    if result.rate is not None:
        arrivals = f"Poisson arrivals at {result.rate:g} a second, up to {result.concurrency} at once"
        return f"{shape}, {result.requests} requests, {arrivals}, seed {result.seed}"
    return f"{shape}, {streams}, {result.requests} measured after warm-up, seed {result.seed}"


def remarks(result: Result) -> dict[str, str]:
    """What does not fit a column: label → text."""
    found = {}
    if result.tuned is not None:
        found["opened as"] = result.tuned
    if result.shares is not None:
        shares = result.shares
        found["time per token"] = (
            f"{shares.inference:.1%} inference engine, {shares.device:.1%} device layer, {shares.runtime:.1%} runtime"
        )
    if result.shared_prefix is not None:
        prefix = result.shared_prefix
        found["shared prefix"] = (
            f"first token {prefix.speedup:.1f} times as fast when {prefix.cached_tokens} of {prefix.tokens} "
            "shared tokens are known"
        )
    if result.copying is not None:
        copying = result.copying
        found["prompt lookup"] = (
            f"copies {copying.speedup:.1f} times as fast, {copying.accepted:.0%} of the drafted tokens held, "
            f"{copying.identical} of {copying.tasks} answers the same"
        )
    if result.timed is not None:
        found["single requests"] = f"{len(result.timed.observations)} times, for edge-glm plan and the router"
    if result.untimed is not None:
        found["single requests"] = f"not timed: {result.untimed}"
    if result.nll_tokens is not None:
        found["loss is over"] = f"{result.nll_tokens} tokens of the bundled text"
    if result.errors:
        found["failed"] = ", ".join(f"{count} × {kind}" for kind, count in sorted(result.errors.items()))
    return found


def machine_lines(machine: Machine, where: str = "") -> list[str]:
    """``where``: put before the processor."""
    memory = "" if machine.memory_bytes is None else f", {format_bytes(machine.memory_bytes)}"
    load = "" if machine.load_average is None else f", load average {machine.load_average:g} before"
    cores = "1 core" if machine.cores == 1 else f"{machine.cores} cores"
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    return [f"{where}{machine.cpu}, {cores}{memory}{load}", f"{machine.os}, Python {machine.python}", versions]


def measured_from(result: Result) -> str:
    """What to say before the machine: of a server, this one has only asked."""
    return "" if result.url is None else "measured from "


def figures(result: Result) -> dict[str, list[str]]:
    """What was measured: label → its value, or one for each percentile."""
    values = msgspec.to_builtins(result)
    found: dict[str, list[str]] = {}
    for metric in METRICS:
        value = metric.of(values)
        if value is not None:
            label, _, level = metric.label.partition(", P")
            found.setdefault(label, []).append(f"P{level} {metric.text(value)}" if level else metric.text(value))
    return found


def _rows(result: Result) -> Iterator[str]:
    for label, texts in figures(result).items():
        yield f"{label:28}  {'  '.join(f'{text:16}' for text in texts)}".rstrip()
    for label, text in remarks(result).items():
        yield f"{label:28}  {text}"


def _ratios(comparison: Comparison) -> Iterator[str]:
    yield f"compared with {comparison.name} (this / that; {ARROWS['better']} better, {ARROWS['worse']} worse)"
    for ratio in comparison.ratios:
        metric = ratio.metric
        sides = f"{metric.text(ratio.ours):>16}  {metric.text(ratio.theirs):>16}"
        yield f"{metric.label:28}  {sides}  {ratio.value:6.2f} {ARROWS[ratio.verdict]}"
    if not comparison.ratios:
        yield "no figure is in both"
    for difference in comparison.differences:
        yield f"note: not the same: {difference}"
