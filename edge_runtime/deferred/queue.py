"""The queue of deferred requests: an SQLite file (WAL, fsync at each commit) that outlives the process and the power.

One row per request. ``queued`` → ``running`` → ``done`` or ``failed``; whoever finds rows ``running`` that nobody runs
puts them back. A request keeps its id, which every attempt sends as its idempotency key.
"""

from __future__ import annotations

import math
import sqlite3
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from edge_runtime.deferred.uptime import boot_id, uptime
from edge_runtime.errors import QueueFull, StorageError
from edge_runtime.policy.rules import Deferred
from edge_runtime.sqlite_file import SqliteFile

State = Literal["queued", "running", "done", "failed"]
PREFIX = "chatcmpl-deferred-"
_SCHEMA = """
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
JUMP_S = 5.0
"""Of the wall clock against the one that cannot be set; less is drift."""
_FARTHEST_S = 1e10
"""Further than this, three centuries, no clock is set: the note of it is damaged."""
_COLUMNS = ("id", "created", "state", "attempts", "due", "waits_for", "body", "result")
_SELECT = f"SELECT {', '.join(_COLUMNS)} FROM requests "  # nosec B608  # names of columns


@dataclass(frozen=True)
class Entry:
    id: str
    created: Annotated[float, msgspec.Meta(ge=-60e9, lt=250e9)]  # datetime has the years 1 to 9999
    """Unix seconds."""
    state: State
    attempts: Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
    due: float
    """Not to be tried before."""
    waits_for: str | None
    """Why it has not been answered yet."""
    body: bytes
    result: bytes | None
    """Of the answer, or of the failure."""


class Queue:
    """Methods may be called from any thread, and from several processes. StorageError where the file fails.

    ``clock``: Unix seconds; ``uptime``: seconds since this machine was started, those in which it slept included. Where
    the clock is set, all times in the file are set with it: nothing becomes too old by that, or waits for longer. What
    was put in in the future, before a restart that cost the clock its time, was put in now.

    A row that is damaged has failed, and hides no other.
    """

    def __init__(
        self,
        path: Path,
        clock: Callable[[], float] = time.time,
        uptime: Callable[[], float] = uptime,
        boot: str | None = None,
        patient: bool = False,
    ) -> None:
        """``boot``: what tells one run of the machine from another; None: as the system tells it. ``patient``: a disk
        that is full or read-only now is tried again at each use."""
        self._clock = clock
        self._uptime = uptime
        self._boot = boot_id() if boot is None else boot
        self._file = SqliteFile(path, _SCHEMA, lambda what: StorageError(f"the queue {what}"))
        self._file.open(patient)

    def add(self, body: bytes, bounds: Deferred) -> str:
        """Keep a request; returns its id once it is on the disk. QueueFull."""
        name = PREFIX + uuid.uuid4().hex
        with self._file.writing() as connection:
            now = self._now(connection)
            self._forget(connection, now, bounds)
            waiting, size = connection.execute(
                "SELECT COUNT(*) FILTER (WHERE state IN ('queued', 'running')), "
                "COALESCE(SUM(LENGTH(body) + COALESCE(LENGTH(result), 0)), 0) FROM requests"
            ).fetchone()
            if waiting >= bounds.max_count:
                raise QueueFull(f"{waiting} deferred requests are waiting, which is the limit; try again later", 60)
            if size + len(body) > bounds.max_bytes:
                raise QueueFull(
                    f"deferred requests and answers take {size} bytes; with {len(body)} more they would pass the limit "
                    f"of {bounds.max_bytes}: fetch and delete answers, or try again later",
                    60,
                )
            connection.execute(
                "INSERT INTO requests (id, created, state, due, body) VALUES (?, ?, 'queued', ?, ?)",
                (name, now, now, body),
            )
        return name

    def put_back(self) -> None:
        """What is ``running`` is not: whoever ran it is gone."""
        with self._file.writing() as connection:
            connection.execute(
                "UPDATE requests SET state = 'queued', due = ? WHERE state = 'running'", (self._now(connection),)
            )

    def take(self, bounds: Deferred) -> Entry | None:
        """The oldest that is due, ``running`` from now on; None: nothing is."""
        with self._file.writing() as connection:
            now = self._now(connection)
            self._forget(connection, now, bounds)
            due = connection.execute(
                "SELECT rowid FROM requests WHERE state = 'queued' AND due <= ? ORDER BY created, rowid", (now,)
            ).fetchall()
            for row in due:
                entry = _entry(connection.execute(_SELECT + "WHERE rowid = ?", row).fetchone())
                if entry.state == "queued":
                    connection.execute(
                        "UPDATE requests SET state = 'running', attempts = attempts + 1 WHERE rowid = ?", row
                    )
                    return entry
        return None

    def wait(self, name: str, why: str, seconds: float) -> None:
        """Not now: try again after so long."""
        with self._file.writing() as connection:
            connection.execute(
                "UPDATE requests SET state = 'queued', due = ?, waits_for = ? WHERE id = ?",
                (self._now(connection) + seconds, why, name),
            )

    def finish(self, name: str, state: State, result: bytes) -> None:
        """``done`` or ``failed``; nothing happens if it was removed meanwhile."""
        with self._file.writing() as connection:
            connection.execute(
                "UPDATE requests SET state = ?, result = ?, waits_for = NULL WHERE id = ?", (state, result, name)
            )

    def get(self, name: str) -> Entry | None:
        with self._file.reading() as connection:
            found = connection.execute(_SELECT + "WHERE id = ?", (name,)).fetchone()
        return None if found is None else _entry(found)

    def entries(self) -> list[Entry]:
        """Oldest first."""
        with self._file.reading() as connection:
            found = connection.execute(_SELECT + "ORDER BY created, rowid").fetchall()
        return [_entry(row) for row in found]

    def remove(self, name: str) -> bool:
        """Whether it was there."""
        with self._file.writing() as connection:
            return connection.execute("DELETE FROM requests WHERE id = ?", (name,)).rowcount > 0

    def close(self) -> None:
        self._file.close()

    # --- inside -------------------------------------------------------------------------------------------------------

    def _now(self, connection: sqlite3.Connection) -> float:
        """By the clock, after whose jumps all that is in the file is set. In a transaction."""
        now = self._clock()
        offset = now - self._uptime()
        boot, known = connection.execute("SELECT boot, offset FROM clock").fetchone() or (None, None)
        jump = offset - known if boot == self._boot and isinstance(known, float) else math.inf
        if JUMP_S <= abs(jump) < _FARTHEST_S:
            connection.execute("UPDATE OR IGNORE requests SET created = created + ?, due = due + ?", (jump, jump))
        if abs(jump) >= JUMP_S:
            connection.execute("INSERT OR REPLACE INTO clock VALUES (1, ?, ?)", (self._boot, offset))
        connection.execute(  # text is greater than any number
            "UPDATE OR IGNORE requests SET created = ?1, due = CASE typeof(created) WHEN 'real' "
            "THEN due - (created - ?1) ELSE ?1 END WHERE created > ?1 + ?2",
            (now, JUMP_S),
        )
        return now

    def _forget(self, connection: sqlite3.Connection, now: float, bounds: Deferred) -> None:
        """What is too old: answers go, what waits fails and can be asked about as long again."""
        age = bounds.max_age_hours * 3600
        connection.execute("DELETE FROM requests WHERE created < ? AND state IN ('done', 'failed')", (now - 2 * age,))
        connection.execute(
            "UPDATE requests SET state = 'failed', result = ? WHERE state = 'queued' AND created < ?",
            (TOO_OLD, now - age),
        )


def _entry(row: Sequence[Any]) -> Entry:
    try:
        return msgspec.convert(dict(zip(_COLUMNS, row, strict=True)), Entry, builtin_types=(bytes,))
    except msgspec.ValidationError as error:
        result = msgspec.json.encode({"error": f"what the queue has kept of it is damaged: {error}", "status": 500})
        return Entry(str(row[0]), 0.0, "failed", 0, 0.0, None, b"", result)


TOO_OLD = b'{"error":"it could not be answered before it was too old","status":504}'
"""As :class:`edge_runtime.deferred.answers.Failed` is written."""
