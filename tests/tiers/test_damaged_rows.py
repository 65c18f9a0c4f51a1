"""Rows of the queue and of the ledger that were damaged: an error in plain words, and whole rows go on being used."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from edge_runtime.cli.main import main
from edge_runtime.deferred.answers import pack, unpack
from edge_runtime.deferred.deferrals import ticket
from edge_runtime.deferred.queue import Queue
from edge_runtime.egress.ledger import BILLION, Cap, Ledger, Sending, Settlement
from edge_runtime.errors import LedgerError, StorageError
from edge_runtime.paths import DURABLE
from edge_runtime.policy.rules import Deferred
from edge_runtime.prompts import Messages, TierRequest
from edge_runtime.server.app import create_app
from tests.server.served import running, wait_until
from tests.tiers.house import GREEDY, LOCAL, QUESTION, TieredModel, cloud, house, task
from tests.tiers.upstream import answers, upstream

BODY = pack(TierRequest(Messages(QUESTION), GREEDY))
DONE = json.dumps({"choices": [], "prompt_tokens": 1, "completion_tokens": 2, "tier": "cloud", "headers": {}}).encode()
BOUNDS = Deferred()
CAP = Cap("month", BILLION)


def change(path: Path, statement: str, *values: object) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as vandal:
        vandal.executescript(DURABLE)
        assert vandal.execute(statement, values).rowcount == 1


# --- the queue --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("id", b"\xff"),
        ("id", None),
        ("created", "yesterday"),
        ("created", 1e12),
        ("created", float("inf")),
        ("state", "lost"),
        ("state", b"done"),
        ("attempts", "many"),
        ("attempts", 2**62),
        ("due", "now"),
        ("due", float("inf")),
        ("waits_for", b"\xff\xfe"),
        ("body", 7),
        ("body", "{}"),
        ("result", 7),
    ],
)
@pytest.mark.parametrize("state", ["queued", "done"])
def test_a_damaged_row_of_the_queue_hides_no_other(state: str, column: str, value: object, tmp_path: Path) -> None:
    path = tmp_path / "deferred.sqlite"
    with closing(Queue(path, boot="a")) as queue:
        names = [queue.add(BODY, BOUNDS) for _ in range(3)]
        if state == "done":
            queue.finish(names[0], "done", DONE)
    change(path, f"UPDATE requests SET {column} = ? WHERE id = ?", value, names[0])
    with closing(Queue(path, boot="b")) as queue:  # after a restart, when times are looked at
        queue.put_back()
        entries = queue.entries()
        assert len(entries) == 3
        assert [ticket(each).state for each in entries if each.id in names[1:]] == ["queued", "queued"]
        taken = [each.id for each in iter(lambda: queue.take(BOUNDS), None)]
        assert [name for name in taken if name != names[0]] == names[1:]
        for name in names[1:]:
            entry = queue.get(name)
            assert entry is not None
            assert entry.body == BODY
        if column != "id":
            assert queue.remove(names[0])


@pytest.mark.parametrize("result", [None, b"", b"{}", b"\xff", b'{"error": "x", "status": 99999}', b"[" * 20_000])
@pytest.mark.parametrize("state", ["done", "failed"])
def test_a_result_that_cannot_be_read_is_a_failure(
    state: str,
    result: bytes | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "deferred.sqlite"
    with closing(Queue(path)) as queue:
        broken, sound = queue.add(BODY, BOUNDS), queue.add(BODY, BOUNDS)
        queue.finish(sound, "done", DONE)
    change(path, "UPDATE requests SET state = ?, result = ? WHERE id = ?", state, result, broken)
    monkeypatch.setenv("EDGE_GLM_HOME", str(tmp_path))
    assert main(["deferred", "--json"]) == 0
    found = {each["id"]: each for each in json.loads(capsys.readouterr().out)}
    assert found[sound]["state"] == "done"
    assert (found[broken]["state"], found[broken]["failure"]["status"]) == ("failed", 500)
    assert "damaged" in found[broken]["failure"]["error"]


def test_a_damaged_row_is_told_over_http(tmp_path: Path) -> None:
    with closing(Queue(tmp_path / "deferred.sqlite")) as queue:
        broken, sound = queue.add(BODY, BOUNDS), queue.add(BODY, BOUNDS)
        queue.finish(broken, "done", b"{")
        queue.finish(sound, "done", DONE)
    with house(tmp_path, LOCAL) as here, running(create_app(TieredModel(here))) as url:
        response = httpx.get(f"{url}/v1/chat/completions/{broken}")
        assert response.status_code == 500
        assert "damaged" in response.json()["error"]["message"]
        assert httpx.get(f"{url}/v1/chat/completions/{sound}").status_code == 200


@pytest.mark.parametrize(
    "changed",
    [
        lambda kept: kept.pop("messages"),
        lambda kept: kept["params"].update(logit_bias={"x": 1}),
        lambda kept: kept["params"].update(logit_bias=None),
        lambda kept: kept["params"].update(max_tokens="many"),
        lambda kept: kept["params"].update(grammar={"kind": "json_object", "text": 5}),
    ],
)
def test_a_request_that_cannot_be_read_fails_by_our_fault(changed: Callable[[Any], object], tmp_path: Path) -> None:
    kept = json.loads(BODY)
    changed(kept)
    body = json.dumps(kept).encode()
    with pytest.raises(StorageError, match="damaged"):
        unpack(body)
    with closing(Queue(tmp_path / "deferred.sqlite")) as queue:
        name = queue.add(body, BOUNDS)
    with house(tmp_path, LOCAL) as here:
        wait_until(lambda: getattr(here.dispatcher.deferrals.get(name), "state", None) == "failed")
        ticket = here.dispatcher.deferrals.get(name)
        assert ticket is not None
        assert ticket.failure is not None
        assert ticket.failure.status == 500
        assert "damaged" in ticket.failure.error


@pytest.mark.parametrize("offset", [b"\xff", "x", 1e300])
def test_a_damaged_note_of_the_clock_is_made_anew(offset: object, tmp_path: Path) -> None:
    path = tmp_path / "deferred.sqlite"
    with closing(Queue(path)) as queue:
        name = queue.add(BODY, BOUNDS)
        change(path, "UPDATE clock SET offset = ?", offset)
        entry = queue.take(BOUNDS)
        assert entry is not None
        assert entry.id == name


# --- the ledger -------------------------------------------------------------------------------------------------------


def fill(path: Path) -> str:
    """Four sendings, settled; returns the last hash."""
    with closing(Ledger(path)) as ledger:
        for number in range(4):
            seq = ledger.send(Sending(f"r{number}", 1, "cloud", "chat", b"content", 5, keep_content=True), [CAP])
            ledger.settle(seq, Settlement(100, 10, 20, 3, "answered"))
        return ledger.head


DAMAGE = [
    ("time", b"now"),
    ("time", float("inf")),
    ("time", -5.0),
    ("event", "lost"),
    ("settles", "x"),
    ("request", b"\xff"),
    ("attempt", 1.5),
    ("bytes_out", b"x"),
    ("prompt_tokens", "x"),
    ("cost", "x"),
    ("cost", 1.5),
    ("cost", -BILLION),
    ("sha256", b"\xff"),
    ("content", 7),
    ("content", "content"),
    ("hash", b"\xff"),
]


@pytest.mark.parametrize(("column", "value"), DAMAGE)
@pytest.mark.parametrize("seq", [7, 8])
def test_a_damaged_row_of_the_ledger_is_found_and_lets_nothing_leave(
    seq: int, column: str, value: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    path = tmp_path / "ledger.sqlite"
    head = fill(path)
    change(path, f"UPDATE entries SET {column} = ? WHERE seq = ?", value, seq)
    with closing(Ledger(path)) as ledger:
        assert any(f"row {seq} was changed" in wrong for wrong in ledger.verify(head))
        with pytest.raises(LedgerError, match=f"row {seq} is damaged.*ledger verify"):
            list(ledger.rows())
        assert len(list(ledger.rows(newest=8 - seq))) == 8 - seq
        if seq == 8:
            with pytest.raises(LedgerError):
                ledger.send(Sending("r", 1, "cloud", "chat", b"", 5))
        else:
            with pytest.raises(LedgerError):
                ledger.settle(seq, Settlement(0, 0, 0, 0, ""))
        try:
            assert ledger.spent(CAP) >= 9  # what three cost
        except LedgerError:
            assert seq == 8 or column == "cost"
    monkeypatch.setenv("EDGE_GLM_HOME", str(tmp_path))
    for action in ("show", "verify", "export"):
        assert main(["ledger", action]) == 1
        said = capsys.readouterr().err
        assert f"row {seq}" in said
        assert "internal error" not in said


def test_rows_in_no_order_end(tmp_path: Path) -> None:
    """The last row's number, in the leaf of the tree that holds it, is one that was before."""
    path = tmp_path / "ledger.sqlite"
    fill(path)
    with closing(sqlite3.connect(path)) as vandal:
        vandal.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        (size,) = vandal.execute("PRAGMA page_size").fetchone()
        (root,) = vandal.execute("SELECT rootpage FROM sqlite_master WHERE name = 'entries'").fetchone()
    data = bytearray(path.read_bytes())
    page = (root - 1) * size
    assert (data[page], data[page + 4]) == (0x0D, 8)  # a leaf of eight cells, whose places follow
    cell = page + int.from_bytes(data[page + 8 + 2 * 7 :][:2], "big")
    assert data[cell] >= 0x80  # its length takes two bytes
    assert data[cell + 2] == 8
    data[cell + 2] = 3
    path.write_bytes(data)
    with closing(Ledger(path)) as ledger:
        for read in (ledger.verify, lambda: list(ledger.rows())):
            with pytest.raises(LedgerError, match="in no order"):
                read()


def test_with_a_damaged_ledger_it_is_answered_here(tmp_path: Path) -> None:
    fill(tmp_path / "ledger.sqlite")
    with (
        upstream(answers("from afar")) as server,
        house(tmp_path, cloud(server.url) + LOCAL + task(prefer="remote")) as here,
    ):
        change(tmp_path / "ledger.sqlite", "UPDATE entries SET time = x'ff' WHERE seq = 8")
        answer = here.ask()
        assert answer.tiers == ["local"]
        assert "damaged" in (answer.route.degraded or "")
        assert not server.asked


@pytest.mark.parametrize(
    ("was", "becomes"),
    [(b"time REAL", b"time XEAL"), (b"cost INTEGER", b"cosu INTEGER"), (b"(settles)", b"(set\xffles)")],
)
def test_a_table_that_is_another_is_no_ledger(was: bytes, becomes: bytes, tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    fill(path)
    with closing(sqlite3.connect(path)) as vandal:
        vandal.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    data = path.read_bytes()
    assert data.count(was) == 1
    path.write_bytes(data.replace(was, becomes))
    with pytest.raises(LedgerError, match="cannot be used"):
        Ledger(path)
