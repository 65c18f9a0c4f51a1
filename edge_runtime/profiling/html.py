"""A profile as one HTML page that needs nothing else; its flame charts can be zoomed by a script within it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib import resources

import msgspec

from edge_runtime.bench.html import json_card, machine_card
from edge_runtime.bench.page import card, page, tile
from edge_runtime.profiling import table
from edge_runtime.profiling.memory_plot import memory_plot
from edge_runtime.profiling.result import Chart, Profile, Result

_STYLE = """
.flame { display: block; width: 100%; touch-action: pan-y; cursor: grab; border-radius: 6px; }
.flame:focus-visible { outline: 2px solid var(--accent); }
.bar { display: flex; flex-wrap: wrap; gap: 8px 14px; align-items: center; margin-bottom: 8px; font-size: 13px; }
.bar button { font: inherit; color: var(--text); background: var(--page); border: 1px solid var(--line);
  border-radius: 6px; padding: 2px 10px; cursor: pointer; }
.told { min-height: 1.5em; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table.numbers td, table.numbers th { white-space: nowrap; }
.band0 { fill: var(--quiet); fill-opacity: .22; } .band1 { fill: var(--accent); fill-opacity: .22; }
.band2 { fill: var(--part1); fill-opacity: .28; } .band3 { fill: var(--part2); fill-opacity: .28; }
.limit { stroke: var(--bad); stroke-width: 1.5; } svg text.named { fill: var(--text); }
"""


def report(profile: Profile) -> str:
    result = profile.result
    body = [
        f"<style>{_STYLE}</style>",
        f"<h1>{escape(table.title(result))}</h1>",
        f"<p>{escape(table.conditions(result))}</p>",
        f'<div class="tiles">{"".join(_tiles(result))}</div>',
        card("Parts of latency", _rows(table.parts(result)) + _text(table.covered(result)), "wide"),
        *(card(table.path_title(path), _rows(table.path_rows(path)), "wide") for path in result.critical_paths),
        *(_flame(chart, place) for place, chart in enumerate(profile.charts)),
        *(
            card(f"Operators: {phase.name}", _text(table.phase_line(phase)) + _rows(table.groups(phase)), "wide")
            for phase in result.phases
        ),
        card("Operators" if result.no_operators else "Limits", _text(_operators_note(result)), "wide"),
        card("Processor", _rows(table.usage(result.usage)) + "".join(map(_text, table.contention(result))), "wide"),
        card("Memory", memory_plot(result.memory) + "".join(map(_text, table.memory_lines(result.memory))), "wide"),
        machine_card(result.machine),
        json_card(result),
        f"<p>edge-glm profile, {escape(result.created)}</p>",
        f"<script>{_script()}</script>",
    ]
    return page(table.title(result), "".join(body))


def _script() -> str:
    return resources.files("edge_runtime.profiling").joinpath("flame.js").read_text(encoding="utf-8")


def _tiles(result: Result) -> list[str]:
    hottest = max((part for part in result.parts), key=lambda part: part.critical)
    return [
        tile("a request, P50", table.number(result.wall_ms.p50), "ms"),
        tile("first token, P50", table.number(result.ttft_ms.p50), "ms"),
        tile("a token then, P50", table.number(result.tpot_ms.p50), "ms"),
        tile(f"most critical: {hottest.part}", f"{hottest.critical:.0%}", "of wall time"),
        tile("peak memory", f"{result.memory.peak / 2**20:,.0f}", "MiB"),
    ]


def _operators_note(result: Result) -> str:
    return result.no_operators or table.limits_line(result.limits)


def _flame(chart: Chart, place: int) -> str:
    data = msgspec.json.encode(chart).decode().replace("<", "\\u003c")  # whatever a name says, the script goes on
    controls = (
        '<div class="bar"><button type="button" data-do="in">zoom in</button>'
        '<button type="button" data-do="out">zoom out</button><button type="button" data-do="all">all</button>'
        "<span>wheel or pinch to zoom, drag to move, arrow keys too</span></div>"
    )
    name = escape(chart.name, quote=True)
    canvas = f'<canvas class="flame" tabindex="0" role="img" aria-label="flame chart: {name}"></canvas>'
    hint = f'<p class="told" aria-live="polite"></p><script type="application/json">{data}</script>'
    body = f'<div id="flame{place}" data-flame>{controls}{canvas}{hint}</div>'
    return card(f"Flame chart: {chart.name}", body, "wide")


def _rows(rows: Sequence[Sequence[str]]) -> str:
    """The first row names the columns; all but words stand to the right."""
    words = [not any(_is_number(row[place]) for row in rows[1:]) for place in range(len(rows[0]))]
    lines = []
    for index, row in enumerate(rows):
        cells = []
        for place, text in enumerate(row):
            kind = "th" if index == 0 or place == 0 else "td"
            number = "" if place == 0 or words[place] else ' class="number"'
            cells.append(f"<{kind}{number}>{escape(text)}</{kind}>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table class="numbers">{"".join(lines)}</table></div>'


def _is_number(text: str) -> bool:
    return text.rstrip("%").replace(",", "").replace(".", "").isdigit()


def _text(words: str) -> str:
    return f"<p>{escape(words)}</p>"
