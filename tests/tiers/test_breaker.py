"""The circuit breaker, and what it spares a tier that fails."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from edge_runtime.tiers import remote
from edge_runtime.tiers.breaker import Breaker
from tests.tiers.house import LOCAL, cloud, house, task
from tests.tiers.upstream import answers, status, upstream


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def made(clock: Clock) -> Breaker:
    return Breaker(failures=2, cooldown=10, longest=35, clock=clock)


def test_it_opens_after_failures_in_a_row() -> None:
    breaker = made(Clock())
    breaker.failed("one")
    assert breaker.state == "closed"
    breaker.succeeded()
    breaker.failed("two")
    assert breaker.enter() is None
    breaker.failed("three")
    assert breaker.state == "open"
    assert "three" in (breaker.enter() or "")
    assert "10.0 s" in (breaker.refusal or "")


def test_after_the_cooldown_one_tries() -> None:
    clock = Clock()
    breaker = made(clock)
    breaker.failed("a")
    breaker.failed("b")
    clock.now = 10
    assert breaker.state == "half-open"
    assert breaker.refusal is None  # asking is no trying
    assert breaker.enter() is None
    assert "another request is trying" in (breaker.enter() or "")
    breaker.succeeded()
    assert breaker.state == "closed"
    assert breaker.enter() is None


def test_each_failed_try_waits_longer() -> None:
    clock = Clock()
    breaker = made(clock)
    breaker.failed("a")
    breaker.failed("b")
    waits = []
    for _ in range(4):
        while breaker.enter() is not None:
            clock.now += 1
        start = clock.now
        breaker.failed("again")
        while breaker.refusal is not None:
            clock.now += 1
        waits.append(clock.now - start)
    assert waits == [20, 35, 35, 35]


def test_a_try_that_says_nothing_leaves_the_next_one_to_try() -> None:
    clock = Clock()
    breaker = made(clock)
    breaker.failed("a")
    breaker.failed("b")
    clock.now = 11
    assert breaker.enter() is None
    breaker.left()
    assert breaker.enter() is None


def test_a_tier_that_asks_for_rest_gets_it() -> None:
    clock = Clock()
    breaker = made(clock)
    breaker.failed("429", retry_after=60)
    clock.now = 59
    assert breaker.enter() is not None
    clock.now = 60
    assert breaker.enter() is None


def test_a_broken_tier_is_not_asked_and_health_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = {"failures": 2, "cooldown": 30}
    clock = Clock()
    monkeypatch.setattr(remote, "Breaker", partial(Breaker, clock=clock))
    with (
        upstream(status(500), status(500), answers("well again")) as server,
        house(tmp_path, cloud(server.url, breaker=rule) + LOCAL + task(prefer="remote")) as here,
    ):
        assert here.dispatcher.health()["tiers"]["cloud"]["state"] == "closed"
        for _ in range(5):
            assert here.ask().tiers == ["local"]
        assert len(server.asked) == 2
        told = here.dispatcher.health()["tiers"]["cloud"]
        assert told["state"] == "open"
        assert "500" in told["reason"]
        here.write(here.path.read_text() + "# the same tiers\n")
        assert here.ask().tiers == ["local"]  # a new version of the policy does not make it well
        clock.now = 30
        assert here.dispatcher.health()["tiers"]["cloud"]["state"] == "half-open"
        assert here.ask().text == "well again"
        assert here.dispatcher.health()["tiers"]["cloud"]["state"] == "closed"
