"""Bytes: reading them from flags, and sharing out a fixed budget under names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple, get_args

from edge_runtime.errors import BudgetError, ConfigError

Purpose = Literal["base", "weights", "kv", "prefix", "activations"]
"""``base``: interpreter and engine; ``weights``: as packed on the device; ``kv``: the KV pool, in which the prefix
cache of finished sequences lives too; ``prefix``: a store of prefixes outside the pool; ``activations``: of one
prefill chunk."""

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


class MemoryBudget:
    """A fixed number of bytes and who has reserved how many of them."""

    def __init__(self, total: int) -> None:
        if total <= 0:
            raise BudgetError(f"a memory budget of {total} bytes cannot hold anything; give a positive size")
        self.total = total
        self._reserved: dict[Purpose, int] = {}

    @property
    def reserved(self) -> Mapping[Purpose, int]:
        return MappingProxyType(self._reserved)

    @property
    def left(self) -> int:
        return self.total - sum(self._reserved.values())

    def reserve(self, purpose: Purpose, nbytes: int) -> None:
        """Add ``nbytes`` to ``purpose``. BudgetError, with nothing changed, if they are not there."""
        if purpose not in get_args(Purpose) or nbytes < 0:
            raise ValueError(f"cannot reserve {nbytes} bytes for {purpose!r}")
        if nbytes > self.left:
            raise BudgetError(
                f"{purpose} needs {format_bytes(nbytes)}, but of the budget of {format_bytes(self.total)} only "
                f"{format_bytes(self.left)} are left ({self._describe()}); a budget of "
                f"{format_bytes(self.total - self.left + nbytes)} would do"
            )
        self._reserved[purpose] = self._reserved.get(purpose, 0) + nbytes

    def release(self, purpose: Purpose) -> int:
        """Give all of ``purpose`` back; returns how many bytes that were."""
        return self._reserved.pop(purpose, 0)

    def kv_tokens_for(self, bytes_per_token: int, *, at_least: int, at_most: int) -> int:
        """How many tokens of KV cache the bytes left can hold, up to ``at_most``. Reserves nothing.

        BudgetError if they cannot hold ``at_least``; it names the context that would fit and the budget needed.
        """
        if bytes_per_token <= 0 or not 0 < at_least <= at_most:
            raise ValueError(f"{bytes_per_token} bytes per token, {at_least} to {at_most} tokens make no sense")
        fits = self.left // bytes_per_token
        if fits < at_least:
            needed = self.total - self.left + at_least * bytes_per_token
            raise BudgetError(
                f"{at_least} tokens of KV cache need {format_bytes(at_least * bytes_per_token)}, but of the budget of "
                f"{format_bytes(self.total)} only {format_bytes(self.left)} are left ({self._describe()}): enough for "
                f"{fits} tokens; take a shorter context, fewer sequences or a budget of {format_bytes(needed)}"
            )
        return min(fits, at_most)

    def _describe(self) -> str:
        parts = [f"{purpose} {format_bytes(nbytes)}" for purpose, nbytes in self._reserved.items()]
        return ", ".join(parts) or "nothing is reserved yet"
