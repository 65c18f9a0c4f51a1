"""A ladder for people: at a terminal, and as an HTML page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from edge_runtime.bench import plots
from edge_runtime.bench.html import json_card, machine_card
from edge_runtime.bench.ladder.job import Climb, Ladder, Step
from edge_runtime.bench.page import card, page
from edge_runtime.bench.table import machine_lines
from edge_runtime.columns import columns
from edge_runtime.memory import format_bytes

_HEADS = ("seconds", "", "first token", "a token", "peak memory", "", "top-1", "KL", "answers the same")


def ladder_table(ladder: Ladder) -> str:
    lines = [f"{ladder.climb.ref}", conditions(ladder.climb), ""]
    for device, steps in ladder.steps.items():
        cells = [[device, *_HEADS], *([step.rung.name, *row(step, steps[0])] for step in steps)]
        lines += [columns(cells, head=True), ""]
    lines += [f"{device}: {why}" for device, why in ladder.problems.items()]
    return "\n".join([*lines, *machine_lines(ladder.machine)])


def conditions(climb: Climb) -> str:
    return (
        f"requests of {climb.prompt_tokens} prompt tokens, of which {climb.requests} have the first "
        f"{climb.shared_tokens} in common, and {climb.new_tokens} new ones, one after the other; {climb.repeats} "
        "rounds after one to warm up; agreement is with the first step, on the texts that come along"
    )


def row(step: Step, first: Step) -> Iterator[str]:
    yield f"{step.seconds:.3f}"
    yield _change(step.seconds, first.seconds)
    yield f"{step.ttft_ms:,.0f} ms"
    yield f"{step.tpot_ms:.1f} ms"
    yield "" if step.peak_rss_bytes is None else format_bytes(step.peak_rss_bytes)
    yield "" if step.peak_rss_bytes is None else _change(step.peak_rss_bytes, first.peak_rss_bytes or 0)
    yield f"{step.top1:.2%}"
    yield f"{step.kl:.5f}"
    yield f"{step.same:.0%}"


def _change(value: float, first: float) -> str:
    return "" if value == first or not first else f"{value / first - 1:+.0%}"


def ladder_page(ladder: Ladder) -> str:
    title = f"Ladder of {ladder.climb.ref}"
    body = [f"<h1>{escape(title)}</h1>", f"<p>{escape(conditions(ladder.climb))}</p>"]
    for device, steps in ladder.steps.items():
        body.append(f'<div class="plots">{"".join(_plots(device, steps))}</div>')
        body.append(card(device, _figures(steps), "wide"))
    body += [f"<p>{escape(f'{device}: {why}')}</p>" for device, why in ladder.problems.items()]
    body += [machine_card(ladder.machine), json_card(ladder)]
    return page(title, f"{''.join(body)}<p>edge-glm bench --ladder, {escape(ladder.created)}</p>")


def _plots(device: str, steps: Sequence[Step]) -> Iterator[str]:
    first = steps[0]
    seconds, memory, agreement = [], [], []
    for step in steps:
        name, peak = step.rung.name, step.peak_rss_bytes
        seconds.append((name, step.seconds, _beside(f"{step.seconds:.2f} s", step.seconds, first.seconds)))
        agreement.append((name, step.top1, f"{step.top1:.2%}"))
        if peak is not None:
            memory.append((name, peak, _beside(format_bytes(peak), peak, first.peak_rss_bytes or 0)))
    yield card(f"Latency of a request, {device}", plots.bars(seconds, "latency"))
    if memory:
        yield card(f"Peak memory, {device}", plots.bars(memory, "memory"))
    yield card(f"Top-1 agreement, {device}", plots.bars(agreement, "agreement"))


def _beside(text: str, value: float, first: float) -> str:
    return f"{text} {_change(value, first)}".rstrip()


def _figures(steps: Sequence[Step]) -> str:
    heads = "".join(f'<th class="number">{escape(head)}</th>' for head in _HEADS)
    rows = [f"<tr><th></th>{heads}</tr>"]
    for step in steps:
        cells = "".join(f'<td class="number">{escape(cell)}</td>' for cell in row(step, steps[0]))
        rows.append(f"<tr><th>{escape(step.rung.name)}</th>{cells}</tr>")
    return f"<table>{''.join(rows)}</table>"
