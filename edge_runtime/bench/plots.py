"""Plots as inline SVG. Colours come from the page's CSS classes, so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 460, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 14, 20, 40
_NAME = 28.0
"""Room that the name of a mark takes."""


def distribution(samples: Sequence[float], marks: Sequence[tuple[str, float]], unit: str, label: str) -> str:
    """The share of ``samples`` at or below each value, a step each, with ``marks`` (name, value) as lines."""
    ordered = sorted(samples)
    low, high = _padded(ordered[0], ordered[-1])
    axes = _Axes((low, high), (0.0, 1.0))
    points = [(low, 0.0)]
    for rank, value in enumerate(ordered, start=1):
        points += [(value, points[-1][1]), (value, rank / len(ordered))]
    points.append((high, 1.0))
    parts = [axes.frame(f"{unit}", [(0.0, "0 %"), (0.25, ""), (0.5, "50 %"), (0.75, ""), (1.0, "100 %")])]
    named_to = -math.inf
    for name, value in marks:
        x = axes.x(value)
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{axes.y(0):.1f}"/>')
        if x - named_to > _NAME:  # names do not lie over one another
            parts.append(f'<text x="{x:.1f}" y="{_TOP - 5}" text-anchor="middle">{escape(name)}</text>')
            named_to = x
    parts.append(axes.path(points))
    if len(ordered) <= 200:
        parts += [
            axes.dot(value, rank / len(ordered), f"{value:.4g} {unit}") for rank, value in enumerate(ordered, start=1)
        ]
    return _svg(parts, label)


def line(points: Sequence[tuple[float, float]], x_label: str, unit: str, label: str) -> str:
    """A line through ``points``; its axis starts at 0, so that a slope is seen for what it is."""
    first, last = points[0][0], points[-1][0]
    axes = _Axes((first, max(last, first + 1)), (0.0, _padded(0.0, max(value for _, value in points))[1]))
    parts = [axes.frame(x_label, [(tick, f"{tick:g} {unit}") for tick in _ticks(0.0, axes.high_y, 4)])]
    parts.append(axes.path(points))
    return _svg(parts, label)


def stacked_bar(shares: Sequence[tuple[str, float]], label: str) -> str:
    """One bar of parts that make 1; the legend, with values, is beneath it."""
    height, x = 34.0, 0.0
    parts = []
    for index, (name, share) in enumerate(shares):
        width = max(share, 0.0) * WIDTH
        parts.append(
            f'<rect class="part{index}" x="{x:.1f}" y="0" width="{max(width - 1, 0.5):.1f}" height="{height}">'
            f"<title>{escape(name)}: {share:.1%}</title></rect>"
        )
        x += width
    for index, (name, share) in enumerate(shares):
        y = height + 24 + 22 * index
        parts.append(f'<rect class="part{index}" x="0" y="{y - 10}" width="12" height="12" rx="2"/>')
        parts.append(f'<text x="20" y="{y}">{escape(name)}</text>')
        parts.append(f'<text x="{WIDTH}" y="{y}" text-anchor="end">{share:.1%}</text>')
    return _svg(parts, label, height + 24 + 22 * len(shares) - 8)


def bars(rows: Sequence[tuple[str, float, str]], label: str) -> str:
    """A bar for each (name, value, what is written beside it), from 0 to the largest."""
    most = max(value for _, value, _ in rows) or 1.0
    parts, step, room = [], 44.0, WIDTH - 130
    for index, (name, value, text) in enumerate(rows):
        y = index * step
        width = max(value / most * room, 1.0)
        parts.append(f'<text x="0" y="{y + 12:.1f}">{escape(name)}</text>')
        parts.append(f'<rect class="cell" x="0" y="{y + 18:.1f}" width="{width:.1f}" height="16" rx="2"/>')
        parts.append(f'<text x="{width + 8:.1f}" y="{y + 31:.1f}">{escape(text)}</text>')
    return _svg(parts, label, step * len(rows) - 6)


def heat_map(rows: Sequence[Sequence[float]], unit: str, label: str) -> str:
    """A column for each of ``rows``, whose values lie above one another; the darker, the larger, on a scale of
    logarithms, since a few are often a hundred times the rest."""
    most = max((value for row in rows for value in row), default=0.0)
    least = min((value for row in rows for value in row if value > 0), default=most)
    deep = max((len(row) for row in rows), default=0)
    width, height = (WIDTH - _LEFT - _RIGHT) / max(len(rows), 1), min(26.0, 150 / max(deep, 1))
    span = math.log(most / least) if most > least > 0 else 1.0
    parts = []
    for column, row in enumerate(rows):
        for place, value in enumerate(row):
            shade = 0.06 + 0.94 * (math.log(value / least) / span if value > 0 and most > least else 0.0)
            parts.append(
                f'<rect class="cell" x="{_LEFT + column * width:.1f}" y="{place * height:.1f}" '
                f'width="{width - 1:.1f}" height="{height - 1:.1f}" fill-opacity="{shade:.3f}">'
                f"<title>layer {column}, {place}: {value:.4g} {escape(unit)}</title></rect>"
            )
    bottom = deep * height + 16
    for place in range(deep):
        if height >= 12 or place % 4 == 0:
            y = place * height + height / 2 + 4
            parts.append(f'<text x="{_LEFT - 8}" y="{y:.1f}" text-anchor="end">{place}</text>')
    for column in range(0, len(rows), max(len(rows) // 10, 1)):
        x = _LEFT + (column + 0.5) * width
        parts.append(f'<text x="{x:.1f}" y="{bottom:.1f}" text-anchor="middle">{column}</text>')
    parts.append(f'<text x="{WIDTH / 2}" y="{bottom + 18:.1f}" text-anchor="middle">layer</text>')
    return _svg(parts, label, bottom + 24)


class _Axes:
    """From data to the picture."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float]) -> None:
        self.low_x, self.high_x = x
        self.low_y, self.high_y = y

    def x(self, value: float) -> float:
        return _LEFT + (value - self.low_x) / (self.high_x - self.low_x) * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - _BOTTOM - (value - self.low_y) / (self.high_y - self.low_y) * (HEIGHT - _TOP - _BOTTOM)

    def frame(self, x_label: str, y_ticks: Sequence[tuple[float, str]]) -> str:
        """Grid, ticks and the horizontal axis' name."""
        parts = []
        for value, name in y_ticks:
            y = self.y(value)
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(name)}</text>')
        bottom = HEIGHT - _BOTTOM
        for value in _ticks(self.low_x, self.high_x, 5):
            x = self.x(value)
            parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
            anchor = "middle" if x < WIDTH - _RIGHT - 12 else "end"
            parts.append(f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="{anchor}">{value:g}</text>')
        middle = (_LEFT + WIDTH - _RIGHT) / 2
        parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
        return "".join(parts)

    def path(self, points: Sequence[tuple[float, float]]) -> str:
        steps = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)
        return f'<polyline class="curve" points="{steps}"/>'

    def dot(self, x: float, y: float, name: str) -> str:
        return (
            f'<circle class="dot" cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="3">'
            f"<title>{escape(name)}</title></circle>"
        )


def _svg(parts: Sequence[str], label: str, height: float = HEIGHT) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def _padded(low: float, high: float) -> tuple[float, float]:
    """A little room on both sides, and some even when all values are one."""
    room = (high - low) * 0.06 or abs(high) * 0.02 or 1.0
    return low - room, high + room


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers from ``low`` to ``high``, ``about`` so many."""
    raw = (high - low) / about
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(each * unit for each in (1, 2, 5, 10) if each * unit >= raw)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]
