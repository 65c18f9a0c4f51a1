"""Bytes: reading sizes and budgets from flags, and writing them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from edge_runtime.errors import ConfigError

_UNITS = {"": 1, "B": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("KMGT", start=1)
    for suffix, base in (("", 1000), ("B", 1000), ("IB", 1024))
}
_PERCENT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(text: str | int) -> int:
    """``"1GiB"`` → 1073741824, ``"500MB"`` → 500000000, a bare number is bytes. ConfigError for anything else."""
    if isinstance(text, int) and not isinstance(text, bool) and text >= 0:
        return text
    match = _SIZE.fullmatch(text) if isinstance(text, str) else None
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise ConfigError(f"{text!r} is not a size: write a number and a unit, such as 512MiB, 1.5GiB or 800MB")
    return int(float(match[1]) * unit)


class BudgetSize(NamedTuple):
    """A budget as it was given."""

    nbytes: int
    percent: float | None = None
    """Of a device's memory; then ``nbytes`` does not count."""

    def within(self, measure: Callable[[], int | None]) -> int:
        """In bytes; ``measure``, asked only for a percentage, gives those of the device, or None: then ConfigError."""
        if self.percent is None:
            return self.nbytes
        memory = measure()
        if memory is None:
            raise ConfigError(
                f"{self.percent:g}% of what? This device does not tell its memory: give the budget a size"
            )
        return int(memory * self.percent / 100)


def parse_budget(text: str | int) -> BudgetSize:
    """A size as :func:`parse_bytes` takes it, or ``"50%"`` of the device's memory.

    ConfigError for anything else, and for nothing at all.
    """
    match = _PERCENT.fullmatch(text) if isinstance(text, str) else None
    size = BudgetSize(parse_bytes(text)) if match is None else BudgetSize(0, float(match[1]))
    if not (size.percent or size.nbytes) or (size.percent or 0) > 100:
        raise ConfigError(f"{text!r} is no memory budget: give a size, such as 512MiB, or up to 100% of the memory")
    return size


def format_bytes(count: int) -> str:
    """``1610612736`` → ``"1.50 GiB"``."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"
