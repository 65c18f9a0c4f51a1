"""A wall clock that is set, and time that the process slept through: no wait ends early by that, and none goes on."""

from __future__ import annotations

import ast
import re
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from edge_runtime.deferred.queue import Queue
from edge_runtime.deferred.uptime import boot_id, uptime
from edge_runtime.egress.ledger import BILLION, Cap, Ledger, OverCap, Sending
from edge_runtime.heartbeat import Heartbeat
from edge_runtime.policy.rules import Deferred
from edge_runtime.server.app import create_app
from edge_runtime.tiers import remote
from edge_runtime.tiers.breaker import LONGEST_WISH_S, Breaker
from tests.server.served import CHAT, FakeModel, running, wait_until
from tests.tiers.house import LOCAL, cloud, house, task
from tests.tiers.upstream import Connection, answers, upstream

YEARS = 10 * 365 * 86400.0
ROOT = Path(__file__).parents[2]
WALL_CLOCKS = {
    # what is shown, or said of files
    "devices/kept_files.py": "how old what a killed process left is, by the file's own time",
    "edge_runtime/bench/measure.py": "when a report was made, and when its process was started, by another's clock",
    "edge_runtime/bench/process.py": "when a process was started, for that process",
    "edge_runtime/cli/remote.py": "how long a model stays, which a server has said as a date",
    "edge_runtime/embedder.py": "when a model was opened, which is shown",
    "edge_runtime/keys.py": "when a key was made, which is shown",
    "edge_runtime/llm.py": "when a model was opened, which is shown",
    "edge_runtime/prefix_store.py": "when a file was used last, by the file's own time",
    "edge_runtime/server/context.py": "when an answer was made, which is shown",
    "edge_runtime/server/ollama.py": "when an answer was made, and until when a model stays, which are shown",
    "edge_runtime/server/responses.py": "when an answer was made, which is shown",
    "edge_runtime/tracing/trace.py": "when a request came, which is shown",
    "edge_runtime/template_sandbox.py": "what day it is, which templates say",
    # what must last beyond a process, with a way to live with jumps
    "edge_runtime/deferred/queue.py": "when a request was put in; set with the clock",
    "edge_runtime/egress/ledger.py": "what was sent when; never back",
    "edge_runtime/tiers/remote.py": "a date that a server has sent without its own",
}
"""Modules that ask what time it is, and what for. All else is measured by clocks that nobody sets."""


def test_durations_are_measured_by_clocks_that_nobody_sets() -> None:
    asking = set()
    for package in ("devices", "edge_runtime"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and ast.unparse(node) in (
                    *("time.time", "time.time_ns", "datetime.now", "datetime.datetime.now", "datetime.today"),
                    *("datetime.utcnow", "time.localtime", "time.gmtime"),
                ):
                    asking.add(path.relative_to(ROOT).as_posix())
    assert asking == set(WALL_CLOCKS)


class Clocks:
    """The wall clock and the machine's uptime."""

    def __init__(self) -> None:
        self.wall, self.up = 1_700_000_000.0, 500.0

    def queue(self, folder: Path, boot: str = "a") -> Queue:
        return Queue(folder / "queue.sqlite", lambda: self.wall, lambda: self.up, boot)

    def wait(self, seconds: float) -> None:
        self.wall += seconds
        self.up += seconds


@pytest.mark.parametrize("jump", [YEARS, -YEARS, 3600.0, -3600.0])
def test_deferred_requests_live_through_a_jump(jump: float, tmp_path: Path) -> None:
    clocks = Clocks()
    queue = clocks.queue(tmp_path)
    bounds = Deferred(max_age_hours=24)
    first = queue.add(b"x", bounds)
    assert queue.take(bounds) is not None
    queue.wait(first, "it is offline", 60)
    second = queue.add(b"y", bounds)
    clocks.wall += jump
    taken = queue.take(bounds)
    assert taken is not None
    assert taken.id == second
    assert queue.take(bounds) is None  # the other has 60 s to wait, as before
    assert abs(taken.created - clocks.wall) < 1
    clocks.wait(59)
    assert queue.take(bounds) is None
    clocks.wait(2)
    again = queue.take(bounds)
    assert again is not None
    assert again.id == first
    queue.wait(first, "it is offline", 0)
    clocks.wait(24 * 3600)  # by real time it does get too old
    assert queue.take(bounds) is None
    entry = queue.get(first)
    assert entry is not None
    assert entry.state == "failed"
    queue.close()


@pytest.mark.parametrize("jump", [YEARS, -YEARS])
def test_processes_that_share_a_queue_set_it_once(jump: float, tmp_path: Path) -> None:
    clocks = Clocks()
    queues = [clocks.queue(tmp_path) for _ in range(3)]
    name = queues[0].add(b"x", Deferred())
    clocks.wall += jump
    for number, queue in enumerate(queues):
        queue.add(b"%d" % number, Deferred())
    entry = queues[0].get(name)
    assert entry is not None
    assert abs(entry.created - clocks.wall) < 1
    for queue in queues:
        queue.close()


def test_a_machine_that_starts_without_the_time_answers_what_waits(tmp_path: Path) -> None:
    """As a box whose clock has no battery: first it is 1970, then the network tells."""
    clocks = Clocks()
    queue = clocks.queue(tmp_path, "a")
    waiting = queue.add(b"x", Deferred())
    queue.wait(waiting, "offline", 30)
    queue.close()
    clocks.wall, clocks.up = 100.0, 20.0
    queue = clocks.queue(tmp_path, "b")
    queue.put_back()
    assert queue.take(Deferred()) is None
    clocks.wait(31)
    clocks.wall = 1_700_000_500.0
    taken = queue.take(Deferred())
    assert taken is not None
    assert taken.id == waiting
    assert abs(taken.created - clocks.wall) < 100
    queue.close()


def test_time_that_the_machine_slept_through_counts_for_deferred_requests(tmp_path: Path) -> None:
    clocks = Clocks()
    queue = clocks.queue(tmp_path)
    name = queue.add(b"x", Deferred(max_age_hours=1))
    clocks.wait(7200)  # both clocks go on while it sleeps
    assert queue.take(Deferred(max_age_hours=1)) is None
    entry = queue.get(name)
    assert entry is not None
    assert entry.state == "failed"
    queue.close()


def test_the_clock_that_nobody_sets() -> None:
    first = uptime()
    assert first <= uptime()
    assert boot_id() == boot_id() != ""


def sending(cost: int) -> Sending:
    return Sending("r", 1, "cloud", "all", b"{}", cost, False)


def test_no_jump_lets_a_day_s_money_be_spent_twice(tmp_path: Path) -> None:
    clock = [1_700_000_000.0]
    ledger = Ledger(tmp_path / "ledger.sqlite", clock=lambda: clock[0])
    caps = [Cap("day", BILLION)]
    ledger.send(sending(BILLION), caps)
    for jump in (-3600.0, -YEARS):
        clock[0] += jump
        with pytest.raises(OverCap):
            ledger.send(sending(BILLION), caps)
    clock[0] = 1_700_000_000.0 + 2 * 86400
    ledger.send(sending(BILLION), caps)  # another day
    clock[0] -= 2 * 86400
    with pytest.raises(OverCap):
        ledger.send(sending(BILLION), caps)
    assert ledger.verify() == []
    ledger.close()


def test_a_server_whose_clock_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rate limits, idle models and answers go by no wall clock."""
    now, plain = [0.0], time.time
    monkeypatch.setattr(time, "time", lambda: plain() + now[0])
    model = FakeModel()
    with running(create_app(model, per_minute=3)) as url:
        for jump in (YEARS, -YEARS, 0.0):
            now[0] = jump
            answer = httpx.post(f"{url}/v1/chat/completions", json=CHAT)
            assert answer.status_code == 200
            assert abs(answer.json()["created"] - time.time()) < 60
        now[0] = YEARS
        assert httpx.post(f"{url}/v1/chat/completions", json=CHAT).status_code == 429
        assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    model.close()


def test_no_server_can_have_itself_left_alone_for_ever() -> None:
    now = [0.0]
    breaker = Breaker(3, 10, 300, clock=lambda: now[0])
    breaker.failed("429", retry_after=float("inf"))
    now[0] = LONGEST_WISH_S - 1
    assert breaker.enter() is not None
    now[0] = LONGEST_WISH_S
    assert breaker.enter() is None


def busy(retry_after: str, date: str | None) -> Any:
    """An upstream that wants to be left alone."""
    head = f"HTTP/1.1 429 Too Many\r\nretry-after: {retry_after}\r\ncontent-length: 0\r\nconnection: close\r\n"
    head += "" if date is None else f"date: {date}\r\n"
    return lambda connection: connection.send(f"{head}\r\n".encode())


def test_a_date_to_come_back_at_is_by_the_server_s_clock(tmp_path: Path) -> None:
    """Whatever day ours believes it to be."""
    dates = [format_datetime(datetime(2001, 2, 3, 4, 5, second, tzinfo=UTC), usegmt=True) for second in (0, 40)]
    with (
        upstream(busy(dates[1], dates[0])) as server,
        house(tmp_path, cloud(server.url) + LOCAL + task(prefer="remote")) as here,
    ):
        assert here.ask().tiers == ["local"]
        told = re.search(r"left alone for (\d+)", str(here.dispatcher.health()["tiers"]["cloud"]))
        assert told is not None
        assert 10 <= int(told[1]) <= 40


# --- time that the process slept through ------------------------------------------------------------------------------


class Slept:
    """A heartbeat whose process can be put to sleep."""

    def __init__(self) -> None:
        self.offset = 0.0
        self.heartbeat = Heartbeat(interval=0.02, clock=lambda: time.monotonic() + self.offset)
        self.leave = self.heartbeat.call(lambda: None)


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> Iterator[Slept]:
    slept = Slept()
    monkeypatch.setattr(remote, "HEARTBEAT", slept.heartbeat)
    yield slept
    slept.leave()


def test_a_connection_that_died_in_the_sleep_is_made_anew(slept: Slept, tmp_path: Path) -> None:
    """And the tier is not thought to be broken."""

    def sleep(connection: Connection) -> None:
        slept.offset += 1000
        connection.reset()

    retry, rule = {"attempts": 2, "base": 0.01}, {"failures": 1, "cooldown": 300.0}
    with upstream(sleep, answers("well again")) as server:
        policy = cloud(server.url, retry=retry, breaker=rule) + LOCAL + task(prefer="remote")
        with house(tmp_path, policy) as here:
            assert here.ask().text == "well again"
            assert here.dispatcher.health()["tiers"]["cloud"]["state"] == "closed"


def test_a_connection_that_died_awake_counts(slept: Slept, tmp_path: Path) -> None:
    retry, rule = {"attempts": 2, "base": 0.01}, {"failures": 1, "cooldown": 300.0}
    with upstream(lambda connection: connection.reset(), answers("well again")) as server:
        policy = cloud(server.url, retry=retry, breaker=rule) + LOCAL + task(prefer="remote")
        with house(tmp_path, policy) as here:
            assert here.ask().tiers == ["local"]
            assert here.dispatcher.health()["tiers"]["cloud"]["state"] == "open"


def test_a_heartbeat_counts_what_it_was_awake() -> None:
    now = [0.0]
    heartbeat = Heartbeat(interval=1.0, clock=lambda: now[0])
    now[0] = 100.0
    assert heartbeat.now() == 100.0  # nobody wants to be called, so nothing tells sleep from rest
    leave = heartbeat.call(lambda: None)
    now[0] = 101.0
    assert heartbeat.now() == 101.0
    now[0] = 100_000.0
    assert heartbeat.now() == 103.0
    assert heartbeat.slept == 100_000 - 103
    now[0] = 50.0  # a clock that is broken
    assert heartbeat.now() == 103.0
    leave()


def test_whoever_fails_when_the_heart_beats_fails_alone(caplog: pytest.LogCaptureFixture) -> None:
    heartbeat, called = Heartbeat(interval=0.01), []

    def fail() -> None:
        raise RuntimeError("a bug")

    leave = [heartbeat.call(fail), heartbeat.call(lambda: called.append(1))]
    wait_until(lambda: len(called) > 2)
    for each in leave:
        each()
    wait_until(lambda: heartbeat._thread is None)
    assert "a bug" in caplog.text
