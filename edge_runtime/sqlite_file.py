"""An SQLite file that outlives the process and the power: WAL mode, and a sync of the disk at each commit."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path

from edge_runtime.disk import of_the_disk, why
from edge_runtime.errors import EdgeError
from edge_runtime.paths import DURABLE, private_file

_PATIENCE_S = 10.0
"""For which others that write are waited for."""


class SqliteFile:
    """Methods may be called from any thread; any number of processes may share the file."""

    def __init__(
        self, path: Path, schema: str, failure: Callable[[str], EdgeError], changes: Sequence[str] = ()
    ) -> None:
        """``schema`` makes a new file, and never changes: the tables of one that is there must be what it makes.
        ``changes``: statements by which later versions differ. A file knows how many it has had (``user_version``) and
        gets the others when it is opened; one that has had more is refused. ``failure`` makes the error to raise of
        what is wrong.

        Of a row that was damaged any value may be of another type than its column's; text that is no UTF-8 is read as
        bytes."""
        self._path = path
        self._schema = schema
        self._changes = tuple(changes)
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
        with self.reading() as connection, _transaction(connection):
            yield connection

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
            connection = sqlite3.connect(self._path, timeout=_PATIENCE_S, isolation_level=None, check_same_thread=False)
            connection.text_factory = _text
            try:
                _make_durable(connection)
                self._make_up_to_date(connection)
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        return self._connection

    def _make_up_to_date(self, connection: sqlite3.Connection) -> None:
        """Whoever opens a sound file of this version writes nothing, for the disk may be read-only."""
        if not self._is_up_to_date(connection):
            with _transaction(connection):
                _changed(connection, self._schema, self._changes, self._had(connection))
                connection.execute(f"PRAGMA user_version = {len(self._changes)}")
        if not self._is_up_to_date(connection):
            raise sqlite3.DatabaseError("its tables are not what they should be")

    def _is_up_to_date(self, connection: sqlite3.Connection) -> bool:
        known = _tables_by(self._schema, self._changes)
        return self._had(connection) == len(self._changes) and known.items() <= _tables(connection).items()

    def _had(self, connection: sqlite3.Connection) -> int:
        """How many of the changes."""
        had: int = connection.execute("PRAGMA user_version").fetchone()[0]
        if not 0 <= had <= len(self._changes):
            raise sqlite3.DatabaseError("a later version of edge-glm has written it (update this one) or it is damaged")
        return had


def _make_durable(connection: sqlite3.Connection) -> None:
    """Of those who are the first to open a new file, and at once, SQLite has all but one fail without waiting."""
    until = time.monotonic() + _PATIENCE_S
    while True:
        try:
            connection.executescript(DURABLE)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
            time.sleep(0.01)
        else:
            return


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # a full disk has ended it already
            connection.execute("ROLLBACK")
        raise


def _changed(connection: sqlite3.Connection, schema: str, changes: Sequence[str], had: int) -> None:
    """To a database that has had the first ``had`` of ``changes``, or is new."""
    for statement in (*(schema.split(";") if had == 0 else ()), *changes[had:]):
        connection.execute(statement)


def _text(data: bytes) -> str | bytes:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def _tables(connection: sqlite3.Connection) -> dict[str, str]:
    """The statement that made each table and index, by its name."""
    return dict(connection.execute("SELECT name, sql FROM sqlite_master"))


@cache
def _tables_by(schema: str, changes: tuple[str, ...]) -> dict[str, str]:
    with closing(sqlite3.connect(":memory:")) as fresh:
        _changed(fresh, schema, changes, 0)
        return _tables(fresh)
