"""A result as one HTML page that needs nothing else: no script, no font, no picture from anywhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

import msgspec

from edge_runtime.bench import plots
from edge_runtime.bench.compare import ARROWS, Comparison
from edge_runtime.bench.metrics import METRICS
from edge_runtime.bench.result import Percentiles, Result
from edge_runtime.bench.table import conditions, figures, machine_lines, remarks, title

_STYLE = """
:root { color-scheme: light dark; --page: #f7f7f5; --card: #fff; --text: #1d1f21; --quiet: #62676d; --line: #e2e3e0;
  --accent: #1f6feb; --part1: #d9822b; --part2: #8a63d2; --good: #1a7f37; --bad: #c62828; }
@media (prefers-color-scheme: dark) { :root { --page: #131517; --card: #1c1f22; --text: #e6e7e8; --quiet: #9aa1a8;
  --line: #33383d; --accent: #6cb2ff; --part1: #f0a860; --part2: #b79bf0; --good: #5cd07f; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1040px; padding: 32px 20px 48px; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 24px; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 15px; margin: 0 0 10px; }
p { margin: 0; color: var(--quiet); }
.tiles, .plots { display: grid; gap: 14px; margin-top: 20px; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); }
.plots { grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }
.card p { font-size: 13px; }
.tile strong { display: block; font-size: 22px; line-height: 1.3; font-variant-numeric: tabular-nums; }
.tile small { font-size: 13px; font-weight: normal; color: var(--quiet); }
.wide { margin-top: 14px; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 18px 5px 0; border-top: 1px solid var(--line); text-align: left; font-weight: normal; }
tr:first-child > * { border-top: 0; }
th { color: var(--quiet); }
.number { text-align: right; white-space: nowrap; }
.better { color: var(--good); }
.worse { color: var(--bad); }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--quiet); font: 12px system-ui, sans-serif; }
.grid { stroke: var(--line); }
.mark { stroke: var(--quiet); stroke-dasharray: 4 3; }
.curve { fill: none; stroke: var(--accent); stroke-width: 2; stroke-linejoin: round; }
.dot { fill: var(--accent); stroke: var(--card); }
.part0 { fill: var(--accent); } .part1 { fill: var(--part1); } .part2 { fill: var(--part2); }
summary { cursor: pointer; }
pre { margin: 10px 0 0; font-size: 12px; white-space: pre-wrap; overflow-wrap: anywhere; }
"""
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
        parts.append(_card(f"Compared with {comparison.name}", _ratios(comparison), "wide"))
    parts += [
        _card("All figures", _figures(result), "wide"),
        _card("Machine", "".join(f"<p>{escape(text)}</p>" for text in machine_lines(result)), "wide"),
        f'<details class="card wide"><summary>JSON</summary><pre>{_json(result)}</pre></details>',
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title(result))}</title><style>{_STYLE}</style></head>"
        f"<body>{''.join(parts)}<p>edge-glm bench, {escape(result.created)}</p></body></html>\n"
    )


def _card(heading: str, body: str, kind: str = "") -> str:
    return f'<section class="card {kind}"><h2>{escape(heading)}</h2>{body}</section>'


def _tiles(result: Result) -> Iterator[str]:
    for metric, value in _values(result):
        if metric.path in _TILES:
            number, unit = metric.text(value).split(" ", 1)
            text = f"<strong>{number} <small>{unit}</small></strong>"
            yield f'<div class="card tile"><p>{escape(metric.label)}</p>{text}</div>'


def _plots(result: Result) -> Iterator[str]:
    samples = result.samples
    if result.ttft_ms is not None:
        yield _distribution("Time to first token", samples.ttft_ms, result.ttft_ms)
    if result.tpot_ms is not None:
        yield _distribution("Time per output token", samples.tpot_ms, result.tpot_ms)
    if samples.itl_by_place_ms:
        heading = "Inter-token latency along the answer"
        plot = plots.line(samples.itl_by_place_ms, "token of the answer", "ms", heading)
        yield _card(heading, f"{plot}<p>median over the streams</p>")
    if result.shares is not None:
        shares = result.shares
        heading = "Where a token's time goes"
        named = [("inference engine", shares.inference), ("device layer", shares.device), ("runtime", shares.runtime)]
        yield _card(heading, plots.stacked_bar(named, heading))


def _distribution(heading: str, samples: list[float], levels: Percentiles) -> str:
    marks = [("P50", levels.p50), ("P95", levels.p95), ("P99", levels.p99)]
    told = ", ".join(f"{name} {value:.4g} ms" for name, value in marks)
    plot = plots.distribution(samples, marks, "ms", heading)
    return _card(heading, f"{plot}<p>share of {len(samples)} streams at or below; {told}</p>")


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


def _json(result: Result) -> str:
    return escape(msgspec.json.format(msgspec.json.encode(result)).decode())
