"""The ledger: whole under everything, and what is changed in it is found."""

from __future__ import annotations

import errno
import hashlib
import json
import sqlite3
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from edge_runtime import sqlite_file
from edge_runtime.egress.ledger import BILLION, Cap, Ledger, OverCap, Sending, Settlement, money, most_of
from edge_runtime.errors import LedgerError
from tests.tiers.house import LOCAL, cloud, house, task
from tests.tiers.upstream import answers, delta, says, stalls, status, stream, upstream

PRICE = {"input": 1000.0, "output": 2000.0}


class Clock:
    def __init__(self, text: str) -> None:
        self.now = datetime.fromisoformat(text).timestamp()

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    ledger = Ledger(path)
    yield ledger
    ledger.close()


def sending(most: int = 5, task_class: str = "chat", body: bytes = b"{}") -> Sending:
    return Sending("req-1", 1, "cloud", task_class, body, most)


def settlement(cost: int | None = 3) -> Settlement:
    return Settlement(100, 10, 20, cost, "answered")


def fill(ledger: Ledger, count: int = 4) -> None:
    for _ in range(count):
        ledger.settle(ledger.send(sending()), settlement())


def test_a_sending_is_two_rows(ledger: Ledger) -> None:
    seq = ledger.send(sending(body=b"what was sent"))
    ledger.settle(seq, settlement())
    sent, settled = ledger.rows()
    assert (sent["event"], sent["bytes_out"], sent["cost"]) == ("sent", 13, 5)
    assert sent["sha256"] == hashlib.sha256(b"what was sent").hexdigest()
    assert sent["content"] is None
    assert (settled["event"], settled["settles"], settled["cost"], settled["bytes_in"]) == ("settled", seq, 3, 100)
    assert (settled["prompt_tokens"], settled["completion_tokens"], settled["outcome"]) == (10, 20, "answered")
    assert ledger.verify() == []


def test_content_is_kept_only_if_asked(ledger: Ledger) -> None:
    ledger.send(Sending("r", 1, "cloud", "chat", b"content", 0, keep_content=True))
    (row,) = ledger.rows()
    assert row["content"] == b"content"


def test_more_can_be_read_than_memory_holds(ledger: Ledger) -> None:
    for number in range(80):
        ledger.send(Sending(f"r{number}", 1, "cloud", "chat", bytes(250_000), 0, keep_content=True))
    tracemalloc.start()
    try:
        assert ledger.verify() == []
        assert [row["request"] for row in ledger.rows()] == [f"r{number}" for number in range(80)]
        assert [row["request"] for row in ledger.rows(newest=18)] == [f"r{number}" for number in range(62, 80)]
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()
    assert list(ledger.rows(newest=0)) == []


@pytest.mark.parametrize("cost", [2**62, 2**70, -1])
def test_what_could_not_be_read_again_is_not_written(cost: int, ledger: Ledger) -> None:
    """Such as by a tier that claims to have used any number of tokens."""
    seq = ledger.send(sending())
    with pytest.raises(LedgerError, match="not possible"):
        ledger.settle(seq, settlement(cost))
    assert ledger.spent(Cap("day", BILLION)) == 5
    ledger.settle(ledger.send(sending()), settlement())
    assert ledger.verify() == []


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ("UPDATE entries SET cost = 0 WHERE seq = 4", "row 4 was changed"),
        ("UPDATE entries SET tier = 'other' WHERE seq = 2", "row 2 was changed"),
        ("UPDATE entries SET time = time + 1 WHERE seq = 1", "row 1 was changed"),
        ("DELETE FROM entries WHERE seq = 3", "row 3 is missing"),
        ("DELETE FROM entries WHERE seq = 1", "row 1 is missing"),
        ("UPDATE entries SET previous = hash WHERE seq = 5", "row 5"),
        ("UPDATE entries SET seq = 99 WHERE seq = 8", "row 8 is missing"),
    ],
)
def test_a_changed_row_is_found(change: str, found: str, path: Path, ledger: Ledger) -> None:
    fill(ledger)
    assert ledger.verify() == []
    with sqlite3.connect(path) as vandal:
        vandal.execute(change)
    vandal.close()
    assert any(found in wrong for wrong in ledger.verify())


def test_changed_content_is_found(path: Path, ledger: Ledger) -> None:
    ledger.send(Sending("r", 1, "cloud", "chat", b"content", 0, keep_content=True))
    with sqlite3.connect(path) as vandal:
        vandal.execute("UPDATE entries SET content = x'00'")
    vandal.close()
    assert ledger.verify() == ["row 1: its content was changed"]


def test_rows_cut_off_at_the_end_are_found_by_an_old_head(path: Path, ledger: Ledger) -> None:
    fill(ledger)
    head = ledger.head
    assert ledger.verify(head) == []
    fill(ledger, 1)
    assert ledger.verify(head) == []
    with sqlite3.connect(path) as vandal:
        vandal.execute("DELETE FROM entries WHERE seq > 6")
    vandal.close()
    assert ledger.verify() == []
    assert "not in the chain" in ledger.verify(head)[0]


def test_the_most_counts_until_it_is_settled(ledger: Ledger) -> None:
    cap = Cap("day", 10)
    first = ledger.send(sending(6), [cap])
    with pytest.raises(OverCap, match=r"leaves 0\.000000004, and this may cost 0\.000000006"):
        ledger.send(sending(6), [cap])
    ledger.settle(first, settlement(1))
    second = ledger.send(sending(6), [cap])
    ledger.settle(second, settlement(None))  # nobody knows: the most counts on
    assert ledger.spent(cap) == 7


def test_caps_by_class_day_and_month(path: Path) -> None:
    clock = Clock("2026-03-30T23:00:00")
    ledger = Ledger(path, clock=clock)
    day, month, of_class = Cap("day", 10), Cap("month", 15), Cap("day", 5, "chat")
    ledger.settle(ledger.send(sending(5)), settlement(5))
    ledger.settle(ledger.send(sending(4, "other")), settlement(4))
    assert [ledger.spent(cap) for cap in (day, month, of_class)] == [9, 9, 5]
    with pytest.raises(OverCap, match="class chat"):
        ledger.send(sending(1), [day, of_class])
    ledger.send(sending(1, "other"), [day])
    clock.now = datetime.fromisoformat("2026-03-31T01:00:00").timestamp()
    assert [ledger.spent(cap) for cap in (day, month, of_class)] == [0, 10, 0]
    clock.now = datetime.fromisoformat("2026-04-01T00:00:01").timestamp()
    assert ledger.spent(month) == 0
    ledger.close()


def test_a_full_disk_is_said_and_nothing_is_half(ledger: Ledger) -> None:
    ledger.send(Sending("a", 1, "cloud", "all", b"{}", 1))
    with ledger._file.reading() as connection:
        connection.execute("PRAGMA max_page_count = 1")  # as many as there are
    big = Sending("b", 1, "cloud", "all", bytes(1 << 20), 1, keep_content=True)
    with pytest.raises(LedgerError, match=r"disk is full; free some space"):
        ledger.send(big)
    with ledger._file.reading() as connection:
        connection.execute("PRAGMA max_page_count = 100000")
    assert [row["request"] for row in ledger.rows()] == ["a"]
    assert ledger.send(big) == 2
    assert ledger.verify() == []


def test_on_a_read_only_disk_what_is_here_answers_and_nothing_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def read_only(path: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with upstream(answers("from afar")) as server:
        with monkeypatch.context() as patched:
            patched.setattr(sqlite_file, "private_file", read_only)
            away = house(tmp_path, cloud(server.url) + LOCAL + task(prefer="remote"))
            here = away.__enter__()
            answer = here.ask()
            assert answer.tiers == ["local"]
            assert "Read-only file system" in answer.route.reason
            assert not server.asked
        assert caplog.text.count("nothing leaves this device") == 1
        assert here.ask().tiers == ["cloud"]  # somebody has seen to the disk
        away.__exit__(None, None, None)


def test_what_is_no_ledger_is_an_error_at_once(tmp_path: Path) -> None:
    (tmp_path / "ledger.sqlite").write_bytes(b"no database at all" * 100)
    with pytest.raises(LedgerError, match="cannot be used"), house(tmp_path, LOCAL):
        pass


def test_a_clock_that_jumps_back_gives_no_second_day(path: Path) -> None:
    clock = Clock("2026-03-30T12:00:00")
    ledger = Ledger(path, clock=clock)
    cap = Cap("day", 10)
    ledger.send(sending(8), [cap])
    clock.now = datetime.fromisoformat("2020-01-01T00:00:00").timestamp()
    with pytest.raises(OverCap):
        ledger.send(sending(8), [cap])
    times = [row["time"] for row in ledger.rows()]
    assert times == sorted(times)
    assert ledger.verify() == []
    ledger.close()


def test_several_processes_share_caps_and_chain(path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from edge_runtime.egress.ledger import *
ledger = Ledger(Path({str(path)!r}))
got = 0
for number in range(80):
    try:
        ledger.send(Sending(sys.argv[1], number, "cloud", "chat", b"x", 1), [Cap("day", 50)])
        got += 1
    except OverCap:
        pass
print(got)
"""
    children = [
        subprocess.Popen([sys.executable, "-c", code, str(number)], stdout=subprocess.PIPE, text=True)
        for number in range(3)
    ]
    got = [int(child.communicate(timeout=60)[0]) for child in children]
    assert sum(got) == 50
    ledger = Ledger(path)
    assert ledger.verify() == []
    assert len(list(ledger.rows())) == 50
    ledger.close()


def test_settling_twice_or_nothing_is_refused(ledger: Ledger) -> None:
    seq = ledger.send(sending())
    ledger.settle(seq, settlement())
    with pytest.raises(LedgerError):
        ledger.settle(seq, settlement())
    with pytest.raises(LedgerError, match="no sending 99"):
        ledger.settle(99, settlement())
    assert ledger.verify() == []


def test_a_file_that_is_no_ledger_is_an_error(path: Path) -> None:
    path.write_bytes(b"this is not a database, and long enough to be sure of that" * 20)
    with pytest.raises(LedgerError, match="cannot be used"):
        Ledger(path)


def test_money() -> None:
    assert most_of(0.15, 0.60, 1_000_000, 1_000_000) == 750_000_000
    assert most_of(0.15, 0.60, 1, 0) == 150
    assert most_of(0.0001, 0, 1, 0) == 1  # never rounded to nothing
    assert money(750_000_000) == "0.75"
    assert money(BILLION) == "1"


# --- under requests ---------------------------------------------------------------------------------------------------


def test_every_sending_is_written_down(tmp_path: Path) -> None:
    with (
        upstream(status(500), answers("hi")) as server,
        house(
            tmp_path,
            cloud(server.url, price=PRICE, retry={"attempts": 2, "base": 0.01}) + LOCAL + task(prefer="remote"),
        ) as here,
    ):
        here.ask()
        here.dispatcher.close()
        rows = here.ledger
        bodies = [asked.raw.partition(b"\r\n\r\n")[2] for asked in server.asked]
        sent = [row for row in rows if row["event"] == "sent"]
        assert [row["sha256"] for row in sent] == [hashlib.sha256(body).hexdigest() for body in bodies]
        assert [row["bytes_out"] for row in sent] == [len(body) for body in bodies]
        outcomes = {row["attempt"]: (row["outcome"], row["cost"]) for row in rows if row["event"] == "settled"}
        assert "500" in outcomes[1][0]
        assert outcomes[1][1] == 0
        assert outcomes[2] == ("answered", most_of(1000, 2000, 11, 3))
        assert all(row["class"] == "all" and row["tier"] == "cloud" for row in rows)


def test_over_the_cap_it_is_answered_here_and_the_header_says_why(tmp_path: Path) -> None:
    policy = "[caps]\nday = 0.5\n" + LOCAL + task(prefer="remote")
    with (
        upstream(answers("from afar")) as server,
        house(tmp_path, "" + cloud(server.url, price=PRICE, max_output=100) + policy) as here,
    ):
        # the most: 1000 tokens of context at 0.001, or fewer bytes, and 12 of an answer at 0.002
        first = here.ask()
        assert first.tiers == ["cloud"]
        here.write(here.path.read_text().replace("day = 0.5", "day = 0.05"))
        second = here.ask()
        assert second.tiers == ["local"]
        assert "the cap of 0.05 a day for all classes" in second.route.headers()["x-edge-glm-route"]
        assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("script", "free"),
    [
        (lambda: status(503), True),
        (lambda: stalls(), False),
        (lambda: says(stream(delta("begun"))), False),
    ],
)
def test_what_may_have_been_answered_counts_with_the_most(script: object, free: bool, tmp_path: Path) -> None:
    quick = {"first_token": 0.5, "read": 0.5}
    with (
        upstream(script()) as server,  # type: ignore[operator]
        house(tmp_path, cloud(server.url, price=PRICE, timeouts=quick) + LOCAL + task(prefer="remote")) as here,
    ):
        with here.start() as generation:
            list(generation)
        here.dispatcher.close()
        sent, settled = here.ledger
        assert sent["cost"] > 0
        assert (settled["cost"] == 0) if free else (settled["cost"] == sent["cost"])


def test_without_a_ledger_nothing_leaves(tmp_path: Path) -> None:
    with (
        upstream(answers("from afar")) as server,
        house(tmp_path, cloud(server.url) + LOCAL + task(prefer="remote")) as here,
    ):
        with sqlite3.connect(tmp_path / "ledger.sqlite") as vandal:
            vandal.execute("DROP TABLE entries")
        vandal.close()
        answer = here.ask()
        assert answer.tiers == ["local"]
        assert "ledger" in (answer.route.degraded or "")
        assert not server.asked


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from edge_runtime.cli.main import main

    monkeypatch.setenv("EDGE_GLM_HOME", str(tmp_path))
    assert main(["ledger", "show"]) == 0
    assert "nothing has left" in capsys.readouterr().err
    ledger = Ledger(tmp_path / "ledger.sqlite")
    fill(ledger)
    ledger.close()
    assert main(["ledger", "show", "--last", "2"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 3
    assert "answered" in shown[-1]
    assert "10+20" in shown[-1]
    assert main(["ledger", "show", "--json"]) == 0
    assert [row["seq"] for row in json.loads(capsys.readouterr().out)] == list(range(1, 9))
    assert main(["ledger", "verify"]) == 0
    assert "the chain is whole" in capsys.readouterr().out
    assert main(["ledger", "export", "--output", str(tmp_path / "out.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["seq"] for row in rows] == list(range(1, 9))
    with sqlite3.connect(tmp_path / "ledger.sqlite") as vandal:
        vandal.execute("UPDATE entries SET cost = 1 WHERE seq = 3")
    vandal.close()
    assert main(["ledger", "verify"]) == 1
    assert "row 3 was changed" in capsys.readouterr().err


def test_a_clock_that_was_ahead_is_named_where_a_cap_stands_still(path: Path) -> None:
    clock = Clock("2030-01-01T12:00:00")
    ledger = Ledger(path, clock=clock)
    cap = Cap("day", 10)
    ledger.send(sending(8), [cap])
    with pytest.raises(OverCap) as plain:
        ledger.send(sending(8), [cap])
    assert "dated" not in str(plain.value)
    clock.now = datetime.fromisoformat("2026-03-30T12:00:00").timestamp()
    with pytest.raises(OverCap, match="last row is dated 2030-01-01 12:00, and no day or month ends before that"):
        ledger.send(sending(8), [cap])
    ledger.close()
