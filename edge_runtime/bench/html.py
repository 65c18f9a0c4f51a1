"""A result as an HTML page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

import msgspec

from edge_runtime.bench import plots
from edge_runtime.bench.compare import ARROWS, Comparison
from edge_runtime.bench.metrics import METRICS
from edge_runtime.bench.page import card, page, tile
from edge_runtime.bench.result import Machine, Percentiles, Result
from edge_runtime.bench.table import conditions, figures, machine_lines, measured_from, remarks, title

_TILES = (
    *("prefill_tps", "decode_tps", "output_tps", "request_rate", "goodput", "ttft_ms.p50", "tpot_ms.p50"),
    *("load_s", "start_s", "peak_rss_bytes"),
)


def report(result: Result, comparison: Comparison | None = None) -> str:
    parts = [
        f"<h1>{escape(title(result))}</h1>",
        f"<p>{escape(conditions(result))}</p>",
        f'<div class="tiles">{"".join(_tiles(result))}</div>',
        f'<div class="plots">{"".join(_plots(result))}</div>',
    ]
    if comparison is not None:
        parts.append(card(f"Compared with {comparison.name}", _ratios(comparison), "wide"))
    parts += [
        card("All figures", _figures(result), "wide"),
        machine_card(result.machine, measured_from(result)),
        json_card(result),
    ]
    return page(title(result), f"{''.join(parts)}<p>edge-glm bench, {escape(result.created)}</p>")


def machine_card(machine: Machine, where: str = "") -> str:
    return card("Machine", "".join(f"<p>{escape(text)}</p>" for text in machine_lines(machine, where)), "wide")


def json_card(result: msgspec.Struct) -> str:
    text = escape(msgspec.json.format(msgspec.json.encode(result)).decode())
    return f'<details class="card wide"><summary>JSON</summary><pre>{text}</pre></details>'


def _tiles(result: Result) -> Iterator[str]:
    for metric, value in _values(result):
        if metric.path in _TILES:
            yield tile(metric.label, *metric.text(value).split(" ", 1))


def _plots(result: Result) -> Iterator[str]:
    samples = result.samples
    if result.ttft_ms is not None:
        yield _distribution("Time to first token", samples.ttft_ms, result.ttft_ms)
    if result.tpot_ms is not None:
        yield _distribution("Time per output token", samples.tpot_ms, result.tpot_ms)
    if samples.itl_by_place_ms:
        heading = "Inter-token latency along the answer"
        plot = plots.line(samples.itl_by_place_ms, "token of the answer", "ms", heading)
        yield card(heading, f"{plot}<p>median over the streams</p>")
    if result.shares is not None:
        shares = result.shares
        heading = "Where a token's time goes"
        named = [("inference engine", shares.inference), ("device layer", shares.device), ("runtime", shares.runtime)]
        yield card(heading, plots.stacked_bar(named, heading))


def _distribution(heading: str, samples: list[float], levels: Percentiles) -> str:
    marks = [("P50", levels.p50), ("P95", levels.p95), ("P99", levels.p99)]
    told = ", ".join(f"{name} {value:.4g} ms" for name, value in marks)
    plot = plots.distribution(samples, marks, "ms", heading)
    return card(heading, f"{plot}<p>share of {len(samples)} streams at or below; {told}</p>")


def _figures(result: Result) -> str:
    rows = [*figures(result).items(), *((label, [text]) for label, text in remarks(result).items())]
    return f"<table>{''.join(_row(label, texts) for label, texts in rows)}</table>"


def _row(label: str, texts: list[str]) -> str:
    span = f' colspan="{4 - len(texts)}"'
    cells = [f"<td{span if text is texts[-1] else ''}>{escape(text)}</td>" for text in texts]
    return f"<tr><th>{escape(label)}</th>{''.join(cells)}</tr>"


def _ratios(comparison: Comparison) -> str:
    head = '<th class="number">this</th><th class="number">that</th><th>this / that</th>'
    rows = [f"<tr><th></th>{head}</tr>"]
    for ratio in comparison.ratios:
        metric = ratio.metric
        numbers = "".join(f'<td class="number">{metric.text(side)}</td>' for side in (ratio.ours, ratio.theirs))
        verdict = f"{ratio.value:.2f} {ARROWS[ratio.verdict]} {ratio.verdict}"
        rows.append(f'<tr><th>{escape(metric.label)}</th>{numbers}<td class="{ratio.verdict}">{verdict}</td></tr>')
    notes = "".join(f"<p>not the same: {escape(text)}</p>" for text in comparison.differences)
    return f"<table>{''.join(rows)}</table>{notes}"


def _values(result: Result) -> Iterator[tuple[Any, float]]:
    values: Mapping[str, Any] = msgspec.to_builtins(result)
    for metric in METRICS:
        value = metric.of(values)
        if value is not None:
            yield metric, value
