"""What was resident over time, over what was planned, as inline SVG."""

from __future__ import annotations

from html import escape

from edge_runtime.memory import format_bytes
from edge_runtime.profiling.result import Memory

WIDTH, HEIGHT = 940, 330
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 150, 56, 42
_NAME = 15.0
"""Height of a line of text."""
_MARK = 62.0
"""Width of a mark's name."""
_NEAR = 1.6
"""A budget is drawn as a line up to so many times what else there is; else it is told beside the plot."""


def memory_plot(memory: Memory) -> str:
    end = max(memory.samples[-1][0], 1e-3)
    most = max(memory.peak, sum(memory.planned.values()))
    drawn = memory.budget is not None and memory.budget <= _NEAR * most
    top = 1.06 * max(most, memory.budget if drawn and memory.budget is not None else 0)

    def x(seconds: float) -> float:
        return _LEFT + seconds / end * (WIDTH - _LEFT - _RIGHT)

    def y(nbytes: float) -> float:
        return HEIGHT - _BOTTOM - nbytes / top * (HEIGHT - _TOP - _BOTTOM)

    parts, below, lowest = [], 0, float(HEIGHT)
    for place, (name, nbytes) in enumerate(memory.planned.items()):
        high, low = y(below + nbytes), y(below)
        parts.append(
            f'<rect class="band{place % 4}" x="{_LEFT}" y="{high:.1f}" width="{WIDTH - _LEFT - _RIGHT}" '
            f'height="{low - high:.1f}"><title>{escape(name)}: {format_bytes(nbytes)} planned</title></rect>'
        )
        lowest = min((high + low) / 2 + 4, lowest - _NAME)  # names do not lie over one another
        label = f"{escape(name)} {format_bytes(nbytes)}"
        parts.append(f'<text class="named" x="{WIDTH - _RIGHT + 8}" y="{lowest:.1f}">{label}</text>')
        below += nbytes
    parts += [_tick(y(share * top / 1.06), share * top / 1.06) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    if drawn and memory.budget is not None:
        at = y(memory.budget)
        parts.append(f'<line class="limit" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{_LEFT + 6}" y="{at - 5:.1f}">budget {format_bytes(memory.budget)}</text>')
    named_to = [-_MARK] * 3  # in each of three lines above the plot
    for seconds, name in memory.marks:
        at = x(seconds)
        parts.append(f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{y(0):.1f}"/>')
        free = next((line for line, last in enumerate(named_to) if at - last >= _MARK), None)
        if free is not None:
            parts.append(f'<text x="{at + 3:.1f}" y="{_TOP - 8 - free * _NAME:.1f}">{escape(name)}</text>')
            named_to[free] = at
    path = " ".join(f"{x(seconds):.1f},{y(nbytes):.1f}" for seconds, nbytes in memory.samples)
    parts.append(f'<polyline class="curve" points="{path}"/>')
    digits = 1 if end >= 1 else 3
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        at = x(share * end)
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - 22}" text-anchor="middle">{share * end:.{digits}f} s</text>')
    label = "resident memory over time, and what was planned"
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _tick(at: float, nbytes: float) -> str:
    line = f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
    return f'{line}<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{nbytes / 2**20:,.0f} MiB</text>'
