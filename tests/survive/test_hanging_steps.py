"""A step that never ends: who waited is answered elsewhere or told, and the step may come back whenever it likes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import numpy as np
import pytest

from devices.base import Step
from devices.errors import EngineError
from edge_runtime.drafting.draft_model import DraftModel
from edge_runtime.engine import Engine
from edge_runtime.errors import EngineStopped, StepTimeout
from edge_runtime.failover import Failover
from edge_runtime.generation import Generation
from edge_runtime.heartbeat import Heartbeat
from edge_runtime.sampling import SamplingParams
from edge_runtime.server.app import create_app
from edge_runtime.step_watch import PATIENCE, UNMEASURED, Abandoned, StepPace, StepWatch
from edge_runtime.stuck import any_stuck
from tests.fake_decoder import FakeDecoder
from tests.runtime.helpers import GREEDY, LetterTokenizer, collect, greedy, prompt
from tests.runtime.machine import Machine, submit
from tests.server.served import CHAT, FakeModel, running, wait_until
from tests.survive.faulty import Hanging

LONG = SamplingParams(temperature=0, max_tokens=60)


class Hands:
    """A clock that stands still until it is turned, and the heartbeat by it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.heartbeat = Heartbeat(interval=1.0, clock=lambda: self.now)

    def wait(self, seconds: float) -> None:
        """With a beat in every second."""
        for _ in range(int(seconds)):
            self.now += 1
            self.heartbeat.beat()

    def sleep(self, seconds: float) -> None:
        """No beat, as in a process that is stopped."""
        self.now += seconds
        self.heartbeat.beat()


@contextmanager
def hung(
    *others: FakeDecoder | EngineError, timeout: float = 30
) -> Iterator[tuple[Failover, FakeDecoder, Hanging, Hands]]:
    """A device that hangs as soon as it is told to, and others after it. In the end the hung step comes back."""
    hands, hanging_step = Hands(), Hanging()
    first = FakeDecoder(before_forward=hanging_step, max_context=4096, kv_tokens=8192)
    failover = Machine(first, *others, heartbeat=hands.heartbeat, step_timeout=timeout).start()
    try:
        yield failover, first, hanging_step, hands
    finally:
        hanging_step.go_on.set()
        failover.close()
        wait_until(lambda: not any_stuck())


def begun_and_hung(failover: Failover, hanging_step: Hanging) -> Generation:
    """A generation of which something has come before the device hangs."""
    begun = submit(failover, prompt(0, 5), SamplingParams(temperature=0, max_tokens=4000))
    assert next(iter(begun)).text
    hanging_step.armed.set()
    assert hanging_step.hangs.wait(60)
    return begun


def test_who_had_nothing_yet_is_answered_by_the_next_device() -> None:
    second = FakeDecoder()
    with hung(second) as (failover, first, hanging_step, hands):
        begun = begun_and_hung(failover, hanging_step)
        waiting = [
            submit(failover, prompt(seed, 9), SamplingParams(temperature=0, max_tokens=12, n=2)) for seed in (1, 2)
        ]
        scores: list[object] = []
        reading = threading.Thread(target=lambda: scores.append(failover.score(prompt(3, 30))))
        reading.start()
        engine = failover.loaded[0].engine
        wait_until(lambda: engine.stats.waiting == 3)
        hands.wait(30 * UNMEASURED + 2)
        for seed, generation in zip((1, 2), waiting, strict=True):
            assert [answer.tokens for answer in collect(generation, 2)] == [greedy(second, prompt(seed, 9), 12)] * 2
        reading.join(60)
        with Engine(FakeDecoder(), LetterTokenizer(), vocab_size=64) as plain:
            np.testing.assert_array_equal(scores[0], plain.score(prompt(3, 30)))
        last = collect(begun)[0].last
        assert last is not None
        assert isinstance(last.error, StepTimeout)
        assert "fake:cpu hangs: a step of 1 token has taken" in str(last.error)
        assert "hangs" in failover.aside["fake:0"]
        assert failover.loaded[0].device == "fake:1"
        assert not first.closed
        # and now it comes back
        hanging_step.go_on.set()
        wait_until(lambda: first.closed)
        assert collect(submit(failover, prompt(4, 9)))[0].tokens == greedy(second, prompt(4, 9), 12)
        second.check_integrity()
        with pytest.raises(EngineStopped, match="hangs"):
            engine.submit([1], GREEDY)


def test_without_another_device_everybody_is_told() -> None:
    with hung() as (failover, first, hanging_step, hands):
        begun = begun_and_hung(failover, hanging_step)
        waiting = submit(failover, prompt(1, 9))
        hands.wait(30 * UNMEASURED + 2)
        for generation in (begun, waiting):
            last = collect(generation)[0].last
            assert last is not None
            assert isinstance(last.error, EngineStopped)
            assert "hangs" in str(last.error)
            assert "no other device can take over: start the program anew" in str(last.error)
        engine = failover.loaded[0].engine
        assert engine.failure is not None
        assert "start the program anew" in engine.failure
        with pytest.raises(EngineStopped, match="start the program anew"):
            submit(failover, prompt(2, 9))
        assert any_stuck()
        failover.close()  # does not wait for it
        assert not first.closed


def test_the_next_device_may_not_open() -> None:
    with hung(EngineError("no driver")) as (failover, _, hanging_step, hands):
        begun = begun_and_hung(failover, hanging_step)
        waiting = submit(failover, prompt(1, 9))
        hands.wait(30 * UNMEASURED + 2)
        last = collect(waiting)[0].last
        assert last is not None
        assert "nothing takes its place" in str(last.error)
        assert "fake:1: it does not open (no driver)" in str(last.error)
        assert collect(begun)[0].finish_reason == "error"
        assert "no driver" in str(failover.loaded[0].engine.failure)


def test_whoever_should_take_over_may_not_know_either(caplog: pytest.LogCaptureFixture) -> None:
    def ask(error: EngineError) -> None:
        raise RuntimeError("a bug")

    hands, hanging_step = Hands(), Hanging(armed=True)
    decoder = FakeDecoder(before_forward=hanging_step)
    engine = Engine(decoder, LetterTokenizer(), vocab_size=64, heartbeat=hands.heartbeat, successor=ask)
    generation = engine.submit(prompt(1, 9), GREEDY)
    assert hanging_step.hangs.wait(60)
    hands.wait(30 * UNMEASURED + 2)
    assert collect(generation)[0].finish_reason == "error"
    assert "a bug" in caplog.text
    hanging_step.go_on.set()
    wait_until(lambda: decoder.closed)
    engine.close()


def test_a_step_that_is_merely_slow_comes_to_its_end() -> None:
    with hung(FakeDecoder()) as (failover, first, hanging_step, hands):
        hanging_step.armed.set()
        slow = submit(failover, prompt(1, 9))
        assert hanging_step.hangs.wait(60)
        hands.wait(30 * UNMEASURED - 2)
        hanging_step.go_on.set()
        assert collect(slow)[0].tokens == greedy(first, prompt(1, 9), 12)
        assert not failover.aside


def test_what_a_process_sleeps_through_is_not_the_device_s_fault() -> None:
    with hung(FakeDecoder()) as (failover, first, hanging_step, hands):
        hanging_step.armed.set()
        slow = submit(failover, prompt(1, 9))
        assert hanging_step.hangs.wait(60)
        for _ in range(10):
            hands.sleep(100_000)
        hanging_step.go_on.set()
        assert collect(slow)[0].tokens == greedy(first, prompt(1, 9), 12)
        assert not failover.aside


def test_a_hanging_draft_is_a_hanging_engine() -> None:
    hands, hanging_step, model = Hands(), Hanging(armed=True), FakeDecoder()
    draft = DraftModel(FakeDecoder(before_forward=hanging_step))
    engine = Engine(model, LetterTokenizer(), vocab_size=64, draft=draft, heartbeat=hands.heartbeat)
    generation = engine.submit(prompt(1, 9), LONG)
    assert hanging_step.hangs.wait(60)
    hands.wait(30 * UNMEASURED + 2)
    assert collect(generation)[0].finish_reason == "error"
    hanging_step.go_on.set()
    wait_until(lambda: model.closed)
    engine.close()


def test_closing_does_not_wait_for_a_step_that_hangs() -> None:
    with hung() as (failover, first, hanging_step, hands):
        begun = begun_and_hung(failover, hanging_step)
        engine = failover.loaded[0].engine
        closing = threading.Thread(target=engine.close)
        closing.start()
        wait_until(lambda: not engine.alive)
        hands.wait(3)
        assert closing.is_alive()
        hands.wait(4)
        closing.join(60)
        assert not closing.is_alive()
        assert "closed" in str(collect(begun)[0].last)
        assert engine.failure is None  # somebody wanted it
        hanging_step.go_on.set()
        wait_until(lambda: first.closed)


def test_a_step_may_take_what_steps_have_taken() -> None:
    pace = StepPace(least=1.0)
    assert pace.limit(1) == pace.limit(256) == UNMEASURED
    pace.took(1, 0.5)
    assert pace.limit(1) == PATIENCE * 0.5
    assert pace.limit(256) == PATIENCE * 0.5 * 256
    pace.took(256, 8.0)
    assert pace.limit(256) == PATIENCE * 8
    assert pace.limit(128) == PATIENCE * 8  # no more than a larger one
    assert pace.limit(4) == PATIENCE * 2  # nor in proportion to a smaller one
    pace.took(256, 80.0)  # as on a machine that is busy
    assert pace.limit(256) == PATIENCE * 80
    for _ in range(1000):
        pace.took(256, 0.01)
    assert pace.limit(256) == 1.0


def test_whether_a_step_has_ended_in_time_is_decided_once() -> None:
    hands, told = Hands(), threading.Event()
    decoder = FakeDecoder()
    watch = StepWatch(1.0, hands.heartbeat, lambda error: told.set())
    forward = watch.guard(decoder)
    sequence = decoder.new_sequence()
    step = Step(sequence, np.zeros(1, np.int64), 1)

    assert len(forward([step])) == 1
    hands.wait(10 * UNMEASURED)  # nothing runs
    assert not watch.abandoned
    decoder.before_forward = lambda batch: hands.wait(PATIENCE + UNMEASURED)
    with pytest.raises(Abandoned):
        forward([step])
    assert told.wait(60)
    assert not any_stuck()
    watch.close()


def test_health_tells_a_watchdog_to_start_the_process_anew() -> None:
    hands, hanging_step = Hands(), Hanging(armed=True)
    model = FakeModel(before_forward=hanging_step, heartbeat=hands.heartbeat)
    with running(create_app(model)) as url:
        assert httpx.get(f"{url}/health/live").json() == {"status": "ok"}
        answers: list[httpx.Response] = []
        asking = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{url}/v1/chat/completions", json=CHAT, timeout=60))
        )
        asking.start()
        assert hanging_step.hangs.wait(60)
        assert httpx.get(f"{url}/health/ready").status_code == 200
        hands.wait(30 * UNMEASURED + 2)
        asking.join(60)
        assert answers[0].status_code == 503
        assert "start the program anew" in answers[0].json()["error"]["message"]
        ready, live = httpx.get(f"{url}/health/ready"), httpx.get(f"{url}/health/live")
        assert ready.status_code == live.status_code == 503
        assert ready.json()["stopped"] == ["fake"]
        assert "fake:cpu hangs" in ready.json()["models"]["fake"]["failure"]
        assert live.json()["status"] == "dead"
        assert "fake:cpu hangs" in live.json()["models"]["fake"]
        assert httpx.post(f"{url}/v1/chat/completions", json=CHAT).status_code == 503
    model.close()
    hanging_step.go_on.set()
    wait_until(lambda: not any_stuck())
