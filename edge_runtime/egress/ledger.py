"""The ledger: everything that leaves the device, what it costs and what it may cost, in an append-only chain of rows.

SQLite in WAL mode. Each row holds the SHA-256 of itself and the row before, so that a row that was changed, put in or
taken out breaks the chain from there on. (Rows cut off at the end leave a shorter chain that is sound: keep the last
hash elsewhere, and :meth:`Ledger.verify` finds that too.)

A sending is two rows: ``sent`` before the first byte leaves, with the most that it may cost, and ``settled`` once it is
over, with what it did. A sending that was never settled, as after a power cut, keeps counting with the most. Several
processes may share a ledger. Money is counted in billionths, as integers.
"""

from __future__ import annotations

import hashlib
import json
import math
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import msgspec

from edge_runtime.errors import LedgerError
from edge_runtime.sqlite_file import SqliteFile

BILLION = 10**9
_AHEAD_S = 60.0
"""By so much a clock is set without anybody's noticing."""
Period = Literal["day", "month"]

_SCHEMA = """
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
FIRST = "0" * 64
"""What stands before the first row."""
_Count = Annotated[int, msgspec.Meta(ge=0, lt=2**62)]
_Row = TypedDict(
    "_Row",
    {
        "seq": Annotated[int, msgspec.Meta(ge=1, lt=2**62)],
        "time": Annotated[float, msgspec.Meta(ge=0, lt=250e9)],  # datetime ends after the year 9999, 253e9
        "event": Literal["sent", "settled"],
        "settles": int | None,
        "request": str,
        "attempt": int,
        "tier": str,
        "class": str,
        "bytes_out": _Count,
        "bytes_in": _Count,
        "prompt_tokens": _Count | None,
        "completion_tokens": _Count | None,
        "cost": _Count,
        "outcome": str,
        "sha256": str,
        "content": bytes | None,
        "previous": str,
        "hash": str,
    },
)
"""What a row is unless it was damaged: SQLite itself holds no column to its type."""
_COLUMNS = tuple(_Row.__annotations__)
_SELECT = f"SELECT {', '.join(_COLUMNS)} FROM entries "  # nosec B608  # names of columns
_INSERT = f"INSERT INTO entries VALUES ({', '.join('?' * len(_COLUMNS))})"  # nosec B608  # only question marks
_AT_ONCE = 16
"""Rows that are read; each may hold what was sent."""
_HASHED = tuple(name for name in _COLUMNS if name not in ("content", "hash"))


@dataclass(frozen=True)
class Cap:
    """The most that may be spent. ``task_class`` None: by all together."""

    period: Period
    limit: int
    """Billionths."""
    task_class: str | None = None

    def __str__(self) -> str:
        whose = "all classes" if self.task_class is None else f"class {self.task_class}"
        return f"the cap of {money(self.limit)} a {self.period} for {whose}"


@dataclass(frozen=True)
class Sending:
    """What is about to leave."""

    request: str
    attempt: int
    tier: str
    task_class: str
    body: bytes
    most: int
    """Billionths that it may cost."""
    keep_content: bool = False
    """Whether ``body`` is kept, and not its hash alone."""


@dataclass(frozen=True)
class Settlement:
    """What became of it. Tokens: None where nobody said."""

    bytes_in: int
    prompt_tokens: int | None
    completion_tokens: int | None
    cost: int | None
    """None: nobody knows, and the most that it may have cost counts on."""
    outcome: str


class OverCap(LedgerError):
    """It could cost more than a cap leaves; nothing was written."""


class Ledger:
    """Methods may be called from any thread; each takes a millisecond or so, for the disk. LedgerError where it fails.

    ``clock``: Unix seconds. Where it jumps back, rows keep the time of the row before: no day is spent twice.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time, patient: bool = False) -> None:
        """``patient``: a disk that is full or read-only now is tried again at each use."""
        self._path = path
        self._clock = clock
        self._file = SqliteFile(path, _SCHEMA, lambda what: LedgerError(f"the ledger {what}"))
        self.problem = self._file.open(patient)
        """Of the disk when it was opened."""

    def send(self, sending: Sending, caps: Sequence[Cap] = ()) -> int:
        """Write that it is about to leave; returns the row's number. OverCap: it may not."""
        with self._file.writing() as connection:
            last = self._last(connection)
            now = max(self._clock(), last["time"])
            for cap in caps:
                spent = self._spent(connection, cap, now)
                if spent + sending.most > cap.limit:
                    raise OverCap(
                        f"{cap} leaves {money(max(cap.limit - spent, 0))}, and this may cost {money(sending.most)}"
                        + _dated_ahead(now, self._clock())
                    )
            return _append(
                connection,
                last,
                time=now,
                event="sent",
                request=sending.request,
                attempt=sending.attempt,
                tier=sending.tier,
                task_class=sending.task_class,
                bytes_out=len(sending.body),
                cost=sending.most,
                sha256=hashlib.sha256(sending.body).hexdigest(),
                content=sending.body if sending.keep_content else None,
            )

    def settle(self, seq: int, settlement: Settlement) -> None:
        """Write what became of row ``seq``, once."""
        with self._file.writing() as connection:
            last = self._last(connection)
            found = connection.execute(_SELECT + "WHERE seq = ? AND event = 'sent'", (seq,)).fetchone()
            if found is None:
                raise LedgerError(f"{self._path}: there is no sending {seq} to settle")
            sent = self._sound(found)
            _append(
                connection,
                last,
                time=max(self._clock(), last["time"]),
                event="settled",
                settles=seq,
                request=sent["request"],
                attempt=sent["attempt"],
                tier=sent["tier"],
                task_class=sent["class"],
                bytes_in=settlement.bytes_in,
                prompt_tokens=settlement.prompt_tokens,
                completion_tokens=settlement.completion_tokens,
                cost=sent["cost"] if settlement.cost is None else settlement.cost,
                outcome=settlement.outcome,
                sha256=sent["sha256"],
            )

    def spent(self, cap: Cap) -> int:
        """Billionths of ``cap`` that are spent, or may be by what is under way."""
        with self._file.reading() as connection:
            last = self._last(connection)
            return self._spent(connection, cap, max(self._clock(), last["time"]))

    def rows(self, newest: int | None = None) -> Iterator[dict[str, Any]]:
        """In order, ``content`` as bytes or None; only the ``newest`` ones. LedgerError at one that is damaged."""
        yield from map(self._sound, self._found(newest))

    def _found(self, newest: int | None = None) -> Iterator[Sequence[Any]]:
        """As they are, damaged or not; a few at a time, for all of them may be more than memory holds."""
        with self._file.reading() as connection:
            (seq,) = connection.execute(
                "SELECT MIN(seq) FROM (SELECT seq FROM entries ORDER BY seq DESC LIMIT ?)",
                (-1 if newest is None else newest,),
            ).fetchone()
        where = "WHERE seq >= ?"
        while seq is not None:
            with self._file.reading() as connection:
                found = connection.execute(_SELECT + where + " ORDER BY seq LIMIT ?", (seq, _AT_ONCE)).fetchall()
            numbers = [row[0] for row in found]
            if where == "WHERE seq > ?":
                numbers.insert(0, seq)
            if any(before >= after for before, after in pairwise(numbers)):  # they would never end
                raise LedgerError(f"{self._path}: its rows are in no order: it is damaged")
            yield from found
            where, seq = "WHERE seq > ?", found[-1][0] if found else None

    def verify(self, head: str | None = None) -> list[str]:
        """Everything that is wrong with the chain. ``head``: a hash that was its last once, and must be in it."""
        wrong: list[str] = []
        previous, number, met = FIRST, 0, head is None
        for values in self._found():
            row, number = dict(zip(_COLUMNS, values, strict=True)), number + 1
            if row["seq"] != number:
                wrong.append(f"row {number} is missing" if row["seq"] > number else f"row {row['seq']} is out of order")
                number = row["seq"]
            if row["previous"] != previous:
                wrong.append(f"row {number} does not follow the row before it")
            if damage := _damage(row):
                wrong.append(f"row {number} was changed: {damage}")
            else:
                if row["hash"] != _hash(row):
                    wrong.append(f"row {number} was changed")
                content = row["content"]
                if content is not None and hashlib.sha256(content).hexdigest() != row["sha256"]:
                    wrong.append(f"row {number}: its content was changed")
            previous = row["hash"]
            met = met or previous == head
        if not met:
            wrong.append(f"the hash {head} is not in the chain: rows at its end are gone, or were made anew")
        return wrong

    @property
    def head(self) -> str:
        """The last row's hash."""
        with self._file.reading() as connection:
            return str(self._last(connection)["hash"])

    def close(self) -> None:
        self._file.close()

    # --- inside -------------------------------------------------------------------------------------------------------

    def _sound(self, values: Sequence[Any]) -> dict[str, Any]:
        """By columns. LedgerError: it is damaged."""
        row = dict(zip(_COLUMNS, values, strict=True))
        if damage := _damage(row):
            raise LedgerError(
                f"{self._path}: row {row['seq']} is damaged: {damage}; edge-glm ledger verify lists all that is wrong"
            )
        return row

    def _last(self, connection: sqlite3.Connection) -> dict[str, Any]:
        found = connection.execute(_SELECT + "ORDER BY seq DESC LIMIT 1").fetchone()
        return {"seq": 0, "time": 0.0, "hash": FIRST} if found is None else self._sound(found)

    def _spent(self, connection: sqlite3.Connection, cap: Cap, now: float) -> int:
        cost = "COALESCE(after.cost, sent.cost)"
        wanted = (
            f"SELECT SUM({cost}), MIN({cost}) FROM entries sent LEFT JOIN entries after "  # nosec B608  # a constant
            "ON after.settles = sent.seq WHERE sent.event = 'sent' AND sent.time >= ?"
        )
        values: list[Any] = [_start(cap.period, now)]
        if cap.task_class is not None:
            wanted += " AND sent.class = ?"
            values.append(cap.task_class)
        total, least = connection.execute(wanted, values).fetchone()
        if total is None:
            return 0
        if not isinstance(total, int) or least < 0:  # the sum of what are not all integers is none
            raise LedgerError(f"{self._path}: a cost in it is damaged; edge-glm ledger verify says which")
        return total


def most_of(price_input: float, price_output: float, prompt_tokens: int, completion_tokens: int) -> int:
    """Billionths that so many tokens cost, at prices per million; rounded up."""
    return math.ceil(round((price_input * prompt_tokens + price_output * completion_tokens) * BILLION / 1e6, 3))


def money(billionths: int) -> str:
    whole, rest = divmod(billionths, BILLION)
    return f"{whole}.{rest:09}".rstrip("0").rstrip(".")


def _dated_ahead(now: float, clock: float) -> str:
    """The clock was ahead once: what to know where a cap seems to stand still."""
    if now - clock < _AHEAD_S:
        return ""
    date = datetime.fromtimestamp(now).astimezone()
    return f"; the ledger's last row is dated {date:%Y-%m-%d %H:%M}, and no day or month ends before that"


def _start(period: Period, now: float) -> float:
    """When the day or month began, by this machine's time zone."""
    midnight = datetime.fromtimestamp(now).astimezone().replace(hour=0, minute=0, second=0, microsecond=0)
    return (midnight if period == "day" else midnight.replace(day=1)).timestamp()


def _damage(row: dict[str, Any]) -> str:
    """Why it is none that was written here; empty: it may be."""
    try:
        msgspec.convert(row, _Row, builtin_types=(bytes,))
    except msgspec.ValidationError as error:
        return str(error)
    return ""


def _append(
    connection: sqlite3.Connection, last: dict[str, Any], *, time: float, task_class: str, **values: Any
) -> int:
    row = dict.fromkeys(_COLUMNS) | {"bytes_out": 0, "bytes_in": 0, "outcome": ""} | values
    row |= {"seq": last["seq"] + 1, "time": time, "class": task_class, "previous": last["hash"]}
    row["hash"] = _hash(row)
    if damage := _damage(row):  # as the last row it would let nothing leave any more
        raise LedgerError(f"what the ledger should keep is not possible: {damage}")
    connection.execute(_INSERT, [row[name] for name in _COLUMNS])
    return int(last["seq"]) + 1


def _hash(row: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([row[name] for name in _HASHED], ensure_ascii=True).encode()).hexdigest()
