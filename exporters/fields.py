"""Strict reading of a JSON configuration: every field is typed, and one nobody read is found out."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from edge_runtime.errors import CorruptModel, UnsupportedModel


class Fields:
    """A view of one JSON object that remembers what was read.

    A field that is absent or null takes the ``default``; without a default it is an error. Wrong types and values
    outside the stated range raise :class:`CorruptModel` with the field's name and value.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values = values
        self._where = where
        self._read: set[str] = set()

    def has(self, name: str) -> bool:
        """Present and not null."""
        self._read.add(name)
        return self._values.get(name) is not None

    def given(self, name: str) -> bool:
        """Present, even if null: an explicit null may mean "none" where absence means a default."""
        self._read.add(name)
        return name in self._values

    def integer(self, name: str, default: int | None = None, minimum: int = 1, maximum: int = 1 << 40) -> int:
        """``maximum`` only catches damage: no size of a model comes near it."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise self.wrong(name, value, f"an integer from {minimum} to {maximum}")
        return value

    def number(self, name: str, default: float | None = None, above: float = -math.inf) -> float:
        value = self._value(name, default)
        if not _finite(value) or value <= above:
            limit = "a finite number" if above == -math.inf else f"a finite number above {above:g}"
            raise self.wrong(name, value, limit)
        return float(value)

    def boolean(self, name: str, default: bool | None = None) -> bool:
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, value, "true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self._value(name, default)
        if not isinstance(value, str):
            raise self.wrong(name, value, "a string")
        return value

    def numbers(self, name: str, length: int) -> tuple[float, ...]:
        """A list of ``length`` finite positive numbers."""
        values = self._items(name, length)
        numbers = [float(item) for item in values if _finite(item) and item > 0]
        if len(numbers) != length:
            raise self.wrong(name, values, "a list of positive numbers")
        return tuple(numbers)

    def integers(self, name: str, length: int) -> tuple[int, ...]:
        """A list of ``length`` integers; true and false count as 1 and 0."""
        values = self._items(name, length)
        integers = [int(item) for item in values if isinstance(item, int)]
        if len(integers) != length:
            raise self.wrong(name, values, "a list of integers")
        return tuple(integers)

    def texts(self, name: str, length: int) -> tuple[str, ...]:
        values = self._items(name, length)
        texts = [item for item in values if isinstance(item, str)]
        if len(texts) != length:
            raise self.wrong(name, values, "a list of strings")
        return tuple(texts)

    def mapping(self, name: str) -> Mapping[str, Any]:
        """A JSON object; {} when absent."""
        value = self._value(name, {})
        if not isinstance(value, Mapping):
            raise self.wrong(name, value, "an object")
        return value

    def must_be(self, name: str, value: object, why: str) -> None:
        """A field that may only have the one value we compute with, when it is there at all."""
        if self.has(name) and self._values[name] != value:
            raise UnsupportedModel(
                f"{self._where}: {name} = {self._values[name]!r} is not supported, only {value!r}: {why}"
            )

    def agree(self, name: str, value: float) -> None:
        """A field that says again what ``value`` says; CorruptModel if it differs."""
        if self.has(name) and self.number(name) != value:
            raise CorruptModel(f"{self._where}: {name} is {self.number(name):g} in one place and {value:g} in another")

    def unread(self, harmless: frozenset[str]) -> list[str]:
        """Fields that carry a value, were not read, and are not known to be ``harmless``."""
        return sorted(
            name
            for name, value in self._values.items()
            if value is not None and name not in self._read and name not in harmless
        )

    def wrong(self, name: str, value: object, wanted: str) -> CorruptModel:
        shown = repr(value)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        return CorruptModel(f"{self._where}: {name} must be {wanted}, not {shown}")

    def _value(self, name: str, default: object) -> object:
        self._read.add(name)
        value = self._values.get(name)
        if value is not None:
            return value
        if default is None:
            raise CorruptModel(f"{self._where}: {name} is missing")
        return default

    def _items(self, name: str, length: int) -> Sequence[object]:
        value = self._value(name, None)
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != length:
            raise self.wrong(name, value, f"a list of {length} values")
        return value


def _finite(value: object) -> TypeGuard[float]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max  # false for nan too, and no overflow for a huge integer
