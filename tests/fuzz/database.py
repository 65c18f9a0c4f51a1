"""Databases of SQLite made malformed: bytes of the file, or values in its rows that their columns should not have."""

from __future__ import annotations

import json
import random
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from edge_runtime.paths import DURABLE
from tests.fuzz.mutation import NOT_UTF8, VALUES, damage
from tests.fuzz.surface import Case

BYTES, ROWS = "bytes.sqlite", "rows.sqlite"
"""Names of cases. Of the second kind the file is sound, and only what is in its rows may be anything."""
Row = tuple[Any, ...]


class Database:
    """One table of a valid file, and what becomes of it. ``path``: where files are put, to be opened."""

    def __init__(self, path: Path, table: str) -> None:
        """The file is there, and nobody has it open."""
        self._path = path
        self._table = table
        self.valid = path.read_bytes()
        self.rows = self.read()
        """Of the valid file."""
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            found = connection.execute(f"SELECT * FROM {table} LIMIT 1")
            self._columns = [each[0] for each in found.description]
            found.close()
            self._schema = connection.execute("SELECT sql FROM sqlite_master WHERE name = ?", (table,)).fetchone()[0]
            connection.executescript(DURABLE)
            self._set_schema(connection, self._schema.replace(" NOT NULL", ""))  # a damaged row obeys no constraint
        self._loose = path.read_bytes()

    def put(self, data: bytes) -> None:
        """As a file that nobody has open."""
        for end in ("-wal", "-shm"):
            self._path.with_name(self._path.name + end).unlink(missing_ok=True)
        self._path.write_bytes(data)

    def read(self) -> list[Row]:
        """All rows as they are, text as bytes. sqlite3.Error."""
        with closing(sqlite3.connect(self._path)) as connection:
            connection.text_factory = bytes
            return connection.execute(f"SELECT * FROM {self._table} ORDER BY rowid").fetchall()

    def made(self, rng: random.Random, disturbed: Callable[[str, Any], Any]) -> Case:
        """``disturbed``: column and value → another value, of the kinds of JSON or bytes."""
        if rng.random() < 0.4:
            return Case(BYTES, damage(rng, self.valid))
        self.put(self._loose)
        with closing(sqlite3.connect(self._path, isolation_level=None)) as connection:
            connection.executescript(DURABLE)
            for _ in range(rng.choice((1, 1, 2, 3))):
                row, place = rng.randrange(len(self.rows)), rng.randrange(len(self._columns))
                value = _stored(disturbed(self._columns[place], self.rows[row][place]))
                put = f"{self._columns[place]} = {rng.choice(('?', 'CAST(? AS TEXT)'))}"
                with suppress(sqlite3.IntegrityError):  # a row's number is a number, and two have two
                    connection.execute(f"UPDATE {self._table} SET {put} WHERE rowid = ?", (value, row + 1))
            self._set_schema(connection, self._schema)
        return Case(ROWS, self._path.read_bytes())  # closed: nothing is in the log any more

    def _set_schema(self, connection: sqlite3.Connection, statement: str) -> None:
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute("UPDATE sqlite_master SET sql = ? WHERE name = ?", (statement, self._table))
        connection.execute("PRAGMA writable_schema = OFF")


def anything(rng: random.Random) -> Any:
    return rng.choice((*VALUES, *NOT_UTF8))


def _stored(value: Any) -> Any:
    """As SQLite takes it."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        value = str(value)[:5000]
    if isinstance(value, str):
        return value.encode(errors="surrogatepass")
    return json.dumps(value).encode() if isinstance(value, list | dict) else value
