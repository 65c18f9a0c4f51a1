"""The ledger, damaged: nothing leaves by it, or what it says is so."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import closing
from typing import TypeVar

from edge_runtime.egress.ledger import BILLION, Cap, Ledger, Sending, Settlement
from edge_runtime.errors import LedgerError
from tests.fuzz.database import BYTES, ROWS, Database, anything
from tests.fuzz.surface import Case, Failure, Surface, command, sometimes

NOW = 1_800_000_000.5
CAPS = [Cap("day", BILLION), Cap("month", 5 * BILLION), Cap("month", BILLION, "letters")]
T = TypeVar("T")


class Ledgers(Surface):
    name = "ledger"
    weight = 4

    def prepare(self) -> list[Case]:
        self._path = self.folder / "home" / "ledger.sqlite"
        with closing(self._ledger()) as ledger:
            for number in range(8):
                sending = Sending(f"r{number}", 1, "cloud", "letters", b"content" * 9, 5 * number, number % 2 == 0)
                ledger.settle(ledger.send(sending, CAPS), Settlement(100, 10, None, number or None, "answered"))
            self._head = ledger.head
        self._database = Database(self._path, "entries")
        return [Case(BYTES, self._database.valid), Case(ROWS, self._database.valid)]

    def make(self, rng: random.Random) -> Case:
        return self._database.made(rng, lambda column, value: anything(rng))

    def run(self, case: Case) -> None:
        self._database.put(case.data)
        self._refused: LedgerError | None = None
        with closing(self._ledger()) as ledger:
            self._use(ledger)
        self._database.put(case.data)
        if sometimes(case, 8):
            command("ledger", "show", "--json")
            command("ledger", "show")
            command("ledger", "verify", "--head", self._head)
            command("ledger", "export", "--output", str(self.folder / "rows.jsonl"))
        if self._refused is not None:
            raise self._refused

    def _use(self, ledger: Ledger) -> None:
        wrong = self._tried(lambda: ledger.verify(self._head))
        if wrong == [] and [_hashed(row) for row in self._database.read()] != [
            _hashed(row) for row in self._database.rows
        ]:
            raise Failure("a change is not found")
        rows = self._tried(lambda: list(ledger.rows()))
        if wrong == [] and rows is None:
            raise Failure("a ledger in which nothing is wrong cannot be read")
        if any((self._tried(lambda cap=cap: ledger.spent(cap)) or 0) < 0 for cap in CAPS):  # type: ignore[misc]
            raise Failure("less than nothing is spent")
        seq = self._tried(lambda: ledger.send(Sending("new", 1, "cloud", "letters", b"new", 7, True), CAPS))
        if seq is not None:
            self._tried(lambda: ledger.settle(seq, Settlement(1, 2, 3, 4, "answered")))
        if wrong is not None:
            after = self._tried(lambda: ledger.verify(self._head))
            if after is None or not set(after) <= set(wrong):
                raise Failure(f"a new row adds a complaint: {sorted(set(after or ['it cannot be read']) - set(wrong))}")

    def _tried(self, work: Callable[[], T]) -> T | None:
        try:
            return work()
        except LedgerError as error:
            self._refused = self._refused or error
            return None

    def _ledger(self) -> Ledger:
        return Ledger(self._path, lambda: NOW)


def _hashed(row: tuple[object, ...]) -> tuple[object, ...]:
    """Without ``content`` and ``hash``."""
    return (*row[:15], row[16])
