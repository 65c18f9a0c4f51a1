"""An SQLite file that outlives the process and the power: WAL mode, and a sync of the disk at each commit."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path

from edge_runtime.disk import of_the_disk, why
from edge_runtime.errors import EdgeError
from edge_runtime.paths import DURABLE, private_file


class SqliteFile:
    """Methods may be called from any thread; any number of processes may share the file."""

    def __init__(self, path: Path, schema: str, failure: Callable[[str], EdgeError]) -> None:
        """``schema`` makes what is not there yet; ``failure`` makes the error to raise of what is wrong. Of a row that
        was damaged any value may be of another type than its column's; text that is no UTF-8 is read as bytes."""
        self._path = path
        self._schema = schema
        self._failure = failure
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._closed = False

    def open(self, patient: bool = False) -> str | None:
        """Make it, or see that it is what it should be. ``patient``: the disk's failure is returned, in words, and not
        raised; each use tries again."""
        try:
            with self.reading():
                return None
        except EdgeError as error:
            if patient and isinstance(error.__cause__, OSError | sqlite3.Error) and of_the_disk(error.__cause__):
                return str(error)
            raise

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Alone among threads."""
        with self._lock:
            try:
                yield self._opened()
            except (sqlite3.Error, OSError) as error:
                raise self._failure(f"{self._path} cannot be used: {why(error)}") from error
            except UnicodeDecodeError as error:  # the library quotes what it cannot read
                raise self._failure(f"{self._path} cannot be used: it is damaged") from error

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """Alone among processes: all of the block is written, or nothing."""
        with self.reading() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:  # a full disk has ended it already
                    connection.execute("ROLLBACK")
                raise

    def close(self) -> None:
        """Idempotent."""
        with self._lock:
            self._closed = True
            if self._connection is not None:
                self._connection.close()

    def _opened(self) -> sqlite3.Connection:
        if self._connection is None:
            if self._closed:
                raise sqlite3.ProgrammingError("it is closed")
            private_file(self._path)
            connection = sqlite3.connect(self._path, timeout=10, isolation_level=None, check_same_thread=False)
            connection.text_factory = _text
            try:
                connection.executescript(DURABLE + self._schema)
                if not _tables_by(self._schema).items() <= _tables(connection).items():
                    raise sqlite3.DatabaseError("its tables are not what they should be")
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        return self._connection


def _text(data: bytes) -> str | bytes:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def _tables(connection: sqlite3.Connection) -> dict[str, str]:
    """The statement that made each table and index, by its name."""
    return dict(connection.execute("SELECT name, sql FROM sqlite_master"))


@cache
def _tables_by(schema: str) -> dict[str, str]:
    with closing(sqlite3.connect(":memory:")) as fresh:
        fresh.executescript(schema)
        return _tables(fresh)
