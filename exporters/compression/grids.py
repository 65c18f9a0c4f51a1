"""The values that a group of weights may have: evenly spaced, in integer or 4-bit codes, around a zero point."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
"""Of a group's range: what lies outside is clipped, and all the rest rounded more finely."""


@dataclass(frozen=True)
class Grid:
    """Of many groups: ``value = scale · (code − zero)``."""

    scale: Array
    """float16's values, since engines keep them so."""
    zero: Array
    """Integers."""
    top: int
    """The highest code."""

    def of_rows(self) -> Grid:
        """``scale`` (rows, 1) → (rows,)."""
        return Grid(self.scale[:, 0], self.zero[:, 0], self.top)

    def codes(self, values: Array) -> Array:
        """Of the nearest values; ``values`` has groups along the axes of ``scale``."""
        return np.asarray(np.clip(np.rint(values / self.scale + self.zero), 0, self.top))

    def nearest(self, values: Array) -> Array:
        return np.asarray(self.scale * (self.codes(values) - self.zero))


def fit(values: Array, bits: int, symmetric: bool, importance: Array | None = None) -> Grid:
    """For ``values`` (rows, columns), a grid for each row, ``scale`` (rows, 1).

    ``importance`` (columns,): by what the square of an error counts; then, of several ranges, the one with the least of
    it is taken. None: the whole range. 0 is always a value.
    """
    low, high = np.minimum(values.min(-1, keepdims=True), 0), np.maximum(values.max(-1, keepdims=True), 0)
    best = _grid(low, high, bits, symmetric)
    if importance is None:
        return best
    least = _error(best, values, importance)
    for shrink in _SHRINKS[1:]:
        grid = _grid(low * np.float32(shrink), high * np.float32(shrink), bits, symmetric)
        error = _error(grid, values, importance)
        better = error < least
        least = np.where(better, error, least)
        best = Grid(np.where(better, grid.scale, best.scale), np.where(better, grid.zero, best.zero), best.top)
    return best


def _grid(low: Array, high: Array, bits: int, symmetric: bool) -> Grid:
    top = 2**bits - 1
    scale: Array
    if symmetric:  # the wider side takes the lowest code, so that all are used
        middle = np.float32(2 ** (bits - 1))
        widest = np.where(high > -low, high, low)
        scale = _half(np.asarray(widest / -middle, np.float32))
        return Grid(scale, np.full_like(scale, middle), top)
    scale = _half((high - low) / np.float32(top))
    return Grid(scale, np.clip(np.rint(-low / scale), 0, top), top)


def _half(scale: Array) -> Array:
    """A group of zeros, or of values too small for float16, gets the scale 1."""
    rounded = scale.astype(np.float16).astype(np.float32)
    return np.where(rounded == 0, np.float32(1), rounded)


def _error(grid: Grid, values: Array, importance: Array) -> Array:
    return np.asarray(((grid.nearest(values) - values) ** 2 * importance).sum(-1, keepdims=True))
