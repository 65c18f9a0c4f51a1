"""Two tiers are asked, one answers; the other is cancelled."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from edge_runtime.errors import Overloaded
from tests.server.served import wait_until
from tests.tiers.house import LOCAL, cloud, house, task
from tests.tiers.upstream import answers, stalls, status, upstream

AFAR = ("from ", "far ", "away")


def test_of_two_that_race_the_loser_is_cancelled(tmp_path: Path) -> None:
    with (
        upstream(stalls()) as server,
        house(tmp_path, cloud(server.url) + LOCAL + task(prefer="remote", hedge_ms=0, escalate=False)) as here,
    ):
        here.local.gate.clear()
        threading.Thread(target=lambda: (wait_until(lambda: server.asked), here.local.gate.set())).start()
        answer = here.ask()
        assert answer.tiers == ["local"]
        assert answer.text == here.local.text()
        assert server.left.acquire(timeout=5)  # the connection was closed


def test_the_remote_may_win_the_race(tmp_path: Path) -> None:
    with (
        upstream(answers(*AFAR)) as server,
        house(tmp_path, cloud(server.url) + LOCAL + task(prefer="remote", hedge_ms=50)) as here,
    ):
        here.local.gate.clear()
        answer = here.ask()
        here.local.gate.set()
        assert answer.tiers == ["cloud"]
        assert answer.text == "from far away"
        for generation in here.local.started:
            assert [chunk.text for chunk in generation if chunk.text] == []


def test_the_second_is_not_asked_if_the_first_is_quick(tmp_path: Path) -> None:
    with (
        upstream(answers(*AFAR)) as server,
        house(tmp_path, cloud(server.url) + LOCAL + task(prefer="remote", hedge_ms=20000)) as here,
    ):
        assert here.ask().tiers == ["cloud"]
        assert not here.local.started


def test_if_the_first_fails_the_second_is_asked_at_once(tmp_path: Path) -> None:
    with (
        upstream(status(500)) as server,
        house(tmp_path, cloud(server.url) + LOCAL + task(prefer="remote", hedge_ms=20000)) as here,
    ):
        started = time.monotonic()
        answer = here.ask()
        assert answer.tiers == ["local"]
        assert "500" in (answer.route.degraded or "")
        assert time.monotonic() - started < 10


def test_leaving_while_the_second_waits_ends_the_first(tmp_path: Path) -> None:
    with (
        upstream(stalls()) as server,
        house(tmp_path, cloud(server.url) + LOCAL + task(prefer="remote", hedge_ms=20000)) as here,
    ):
        with here.start():
            wait_until(lambda: server.asked)
        assert server.left.acquire(timeout=5)
        assert not here.local.started


def test_if_both_fail_both_are_told(tmp_path: Path) -> None:
    with (
        upstream(status(500)) as server,
        house(tmp_path, cloud(server.url) + LOCAL + task(prefer="remote", hedge_ms=0)) as here,
    ):
        here.local.error = Overloaded("the queue is full")
        with pytest.raises(Exception, match="500") as error:
            here.ask()
        assert "the queue is full" in str(error.value)
