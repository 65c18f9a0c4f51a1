"""Which row of a dense KV cache each sequence lives in. Bookkeeping only: no engine, no memory.

A batch of an engine with dense caches is a range of neighbouring rows. :meth:`RowPool.arrange` says which range a
set of sequences takes and which rows must move before. A few rows inside the range that are not part of the batch
are cheaper than a move: the device runs them idle.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Move:
    """The contents of row ``source`` go to row ``target``; with ``exchange`` the target's go to the source."""

    source: int
    target: int
    exchange: bool


@dataclass(frozen=True)
class Window:
    """Rows ``first .. first + count − 1``, right after ``moves`` were made in order."""

    first: int
    count: int
    moves: tuple[Move, ...]


class RowPool:
    """``capacity`` rows; sequences are known by integer keys that are never used twice."""

    def __init__(self, capacity: int) -> None:
        self._rows: list[int | None] = [None] * capacity
        self._row_of: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._row_of)

    @property
    def capacity(self) -> int:
        return len(self._rows)

    def open(self, key: int) -> int:
        """Give ``key`` the lowest free row. ValueError if it has one; LookupError if none is free."""
        if key in self._row_of:
            raise ValueError(f"sequence {key} has row {self._row_of[key]} already")
        if None not in self._rows:
            raise LookupError(f"all {self.capacity} rows are taken")
        row = self._rows.index(None)
        self._place(key, row)
        return row

    def close(self, key: int) -> int:
        """Free ``key``'s row and return it. KeyError if it has none."""
        row = self._row_of.pop(key)
        self._rows[row] = None
        return row

    def row(self, key: int) -> int:
        return self._row_of[key]

    def arrange(self, keys: Collection[int], cost: Callable[[int], int], idle: int = 0) -> Window:
        """Rows for a batch of ``keys`` with at most ``idle`` others among them.

        ``cost(key)``: what moving that sequence's row costs. The moves are taken as made. Sequences that are in
        range already do not move, and of all ranges the cheapest to fill is taken.
        """
        wanted = set(keys)
        rows = sorted(self._row_of[key] for key in wanted)
        span = rows[-1] - rows[0] + 1
        if span - len(rows) <= idle:
            return Window(rows[0], span, ())

        def price(first: int) -> int:
            inside = range(first, first + len(rows))
            entering = sum(cost(key) for key in wanted if self._row_of[key] not in inside)
            leaving = [self._rows[row] for row in inside]
            return entering + sum(cost(key) for key in leaving if key is not None and key not in wanted)

        first = min(range(self.capacity - len(rows) + 1), key=price)
        inside = range(first, first + len(rows))
        entering = [row for row in rows if row not in inside]
        gaps = [row for row in inside if self._rows[row] not in wanted]
        moves = tuple(self._move(source, target) for source, target in zip(entering, gaps, strict=True))
        return Window(first, len(rows), moves)

    def _move(self, source: int, target: int) -> Move:
        moving, parked = self._rows[source], self._rows[target]
        if moving is None:
            raise ValueError(f"row {source} is free")
        self._rows[source] = None
        self._place(moving, target)
        if parked is not None:
            self._place(parked, source)
        return Move(source, target, exchange=parked is not None)

    def _place(self, key: int, row: int) -> None:
        self._rows[row] = key
        self._row_of[key] = row

    def check_integrity(self) -> None:
        """AssertionError if the two directions of the map differ."""
        held = {key: row for row, key in enumerate(self._rows) if key is not None}
        if held != self._row_of:
            raise AssertionError(f"rows say {held}, keys say {self._row_of}")
