"""A database between versions of the program, and between processes that open it for the first time."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest

from edge_runtime.deferred.queue import Queue
from edge_runtime.egress.ledger import Ledger
from edge_runtime.errors import LedgerError, StorageError
from edge_runtime.policy.rules import Deferred
from edge_runtime.sqlite_file import SqliteFile
from tests.tiers.test_ledger import sending

FIRST = "CREATE TABLE IF NOT EXISTS notes (id INTEGER PRIMARY KEY, said TEXT NOT NULL)"
SECOND = "ALTER TABLE notes ADD COLUMN by TEXT"
THIRD = "CREATE INDEX notes_by ON notes (by)"
FIRST_LEDGER = """
CREATE TABLE IF NOT EXISTS entries (
  seq INTEGER PRIMARY KEY,
  time REAL NOT NULL,
  event TEXT NOT NULL,
  settles INTEGER,
  request TEXT NOT NULL,
  attempt INTEGER NOT NULL,
  tier TEXT NOT NULL,
  class TEXT NOT NULL,
  bytes_out INTEGER NOT NULL,
  bytes_in INTEGER NOT NULL,
  prompt_tokens INTEGER,
  completion_tokens INTEGER,
  cost INTEGER NOT NULL,
  outcome TEXT NOT NULL,
  sha256 TEXT NOT NULL,
  content BLOB,
  previous TEXT NOT NULL,
  hash TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS entries_time ON entries (event, time);
CREATE UNIQUE INDEX IF NOT EXISTS entries_settles ON entries (settles) WHERE settles IS NOT NULL;
"""
FIRST_QUEUE = """
CREATE TABLE IF NOT EXISTS requests (
  id TEXT PRIMARY KEY,
  created REAL NOT NULL,
  state TEXT NOT NULL,
  attempts INTEGER NOT NULL DEFAULT 0,
  due REAL NOT NULL,
  waits_for TEXT,
  body BLOB NOT NULL,
  result BLOB
);
CREATE INDEX IF NOT EXISTS requests_due ON requests (state, due);
CREATE TABLE IF NOT EXISTS clock (id INTEGER PRIMARY KEY CHECK (id = 1), boot TEXT NOT NULL, offset REAL NOT NULL);
"""


def opened(path: Path, *changes: str) -> SqliteFile:
    file = SqliteFile(path, FIRST, lambda what: StorageError(f"the notes {what}"), changes)
    file.open()
    return file


def use(path: Path, statement: str, *values: object, changes: Sequence[str] = ()) -> list[tuple[object, ...]]:
    with closing(opened(path, *changes)) as file, file.writing() as connection:
        return connection.execute(statement, values).fetchall()


def test_a_file_of_an_earlier_version_gets_what_it_has_not_had(tmp_path: Path) -> None:
    path = tmp_path / "notes.sqlite"
    use(path, "INSERT INTO notes (said) VALUES ('a')")
    use(path, "INSERT INTO notes (said, by) VALUES ('b', 'me')", changes=(SECOND,))
    for _ in range(2):
        assert use(path, "SELECT said, by FROM notes", changes=(SECOND, THIRD)) == [("a", None), ("b", "me")]
    new = tmp_path / "new.sqlite"
    assert use(new, "SELECT said, by FROM notes", changes=(SECOND, THIRD)) == []


def test_a_change_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "notes.sqlite"
    use(path, "INSERT INTO notes (said) VALUES ('a')")
    with pytest.raises(StorageError, match="no such table: others"):
        opened(path, SECOND, "ALTER TABLE others ADD COLUMN x")
    assert use(path, "SELECT * FROM notes") == [(1, "a")]


def test_a_file_of_a_later_version_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.sqlite"
    use(path, "INSERT INTO notes (said) VALUES ('a')", changes=(SECOND,))
    before = path.read_bytes()
    with pytest.raises(StorageError, match=r"cannot be used: a later version of edge-glm has written it \(update"):
        opened(path)
    assert path.read_bytes() == before
    assert use(path, "SELECT said FROM notes", changes=(SECOND,)) == [("a",)]


def test_ledger_and_queue_of_the_first_version_are_used(tmp_path: Path) -> None:
    for name, schema in (("ledger", FIRST_LEDGER), ("queue", FIRST_QUEUE)):
        with closing(sqlite3.connect(tmp_path / name)) as connection:
            connection.executescript(schema)
    with closing(Ledger(tmp_path / "ledger")) as ledger:
        ledger.send(sending())
        assert ledger.verify() == []
    with closing(Queue(tmp_path / "queue")) as queue:
        queue.add(b"{}", Deferred())
        assert len(queue.entries()) == 1


def test_a_ledger_of_a_later_version_says_so(tmp_path: Path) -> None:
    Ledger(tmp_path / "ledger").close()
    with closing(sqlite3.connect(tmp_path / "ledger")) as connection:
        connection.execute("PRAGMA user_version = 7")
    with pytest.raises(LedgerError, match="later version of edge-glm"):
        Ledger(tmp_path / "ledger")


def test_who_opens_a_new_file_waits_for_another_who_does_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "notes.sqlite"
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")

        def ends(seconds: float) -> None:
            if other.in_transaction:
                other.execute("COMMIT")

        monkeypatch.setattr(time, "sleep", ends)
        assert use(path, "SELECT * FROM notes") == []
        assert other.execute("PRAGMA journal_mode").fetchone() == ("wal",)
