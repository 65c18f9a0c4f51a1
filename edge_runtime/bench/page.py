"""The frame of a report: one HTML page that needs nothing else: no script, no font, no picture from anywhere."""

from __future__ import annotations

from html import escape

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
.cell { fill: var(--accent); }
.part0 { fill: var(--accent); } .part1 { fill: var(--part1); } .part2 { fill: var(--part2); }
summary { cursor: pointer; }
pre { margin: 10px 0 0; font-size: 12px; white-space: pre-wrap; overflow-wrap: anywhere; }
"""


def page(title: str, body: str) -> str:
    """``body`` is HTML, ``title`` is not."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>{body}</body></html>\n"
    )


def card(heading: str, body: str, kind: str = "") -> str:
    """``body`` is HTML; ``kind``: more CSS classes."""
    return f'<section class="card {kind}"><h2>{escape(heading)}</h2>{body}</section>'


def tile(label: str, number: str, unit: str = "") -> str:
    """One figure."""
    text = f"<strong>{escape(number)} <small>{escape(unit)}</small></strong>"
    return f'<div class="card tile"><p>{escape(label)}</p>{text}</div>'
