"""What an engine has to do just now, and what is known of a prompt, as the router sees it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import pytest

from devices.base import Step
from edge_runtime.prompts import TierRequest, TokenIds
from edge_runtime.switching import Switching
from edge_runtime.tiers.model import LocalModel
from edge_runtime.timing.model import ALONE, Beside, TimingModel
from edge_runtime.variants import Variants
from tests.fake_decoder import FakeDecoder
from tests.runtime.helpers import GREEDY, collect
from tests.runtime.machine import Machine
from tests.timing.known import CHUNK, observed

PLACES = 3


class Box:
    """A local model over the fake decoder, which runs only while ``gate`` is set."""

    def __init__(self, timing: TimingModel | None) -> None:
        self.gate, self.reached = threading.Event(), threading.Event()
        self.gate.set()
        decoder = FakeDecoder(max_context=512, max_sequences=PLACES, kv_tokens=2048, before_forward=self._wait)
        machine = Machine(decoder)
        machine.timing = timing
        self.failover = machine.start()
        variants = Variants(lambda model: {}, None, None, PLACES)
        self.model = LocalModel(self.failover, Switching(self.failover, variants, False))

    def _wait(self, batch: Sequence[Step]) -> None:
        self.reached.set()
        assert self.gate.wait(60)

    def stop(self) -> None:
        """Once a step has begun, which does not end."""
        self.gate.clear()
        self.reached.clear()


@pytest.fixture
def box() -> Iterator[Box]:
    made = Box(TimingModel(observed(), CHUNK))
    yield made
    made.gate.set()
    made.failover.close()


def request(first: int, length: int) -> TierRequest:
    """A prompt that begins like no other ``first``."""
    return TierRequest(TokenIds([1 + (first + place) % 60 for place in range(length)]), GREEDY)


def test_an_idle_engine(box: Box) -> None:
    told = box.model.predicted_ttft(request(0, 300))
    assert told is not None
    assert (told.prompt, told.cached, told.beside) == (300, 0, ALONE)
    assert told.first_token == TimingModel(observed(), CHUNK).ttft(300)


def test_a_known_prefix(box: Box) -> None:
    collect(box.model.start(request(0, 100)))
    told = box.model.predicted_ttft(request(0, 300))
    unknown = box.model.predicted_ttft(request(7, 300))
    assert told is not None
    assert unknown is not None
    assert 64 <= told.cached <= 112
    assert unknown.cached == 0
    assert told.ms < unknown.ms


def test_what_runs_and_what_waits(box: Box) -> None:
    box.stop()
    running = box.model.start(request(0, 200))
    assert box.reached.wait(60)
    waiting = box.model.start(request(7, 150))
    told = box.model.predicted_ttft(request(13, 100))
    assert told is not None
    assert told.beside == Beside(2, 0, (200, 150))
    idle = TimingModel(observed(), CHUNK)
    assert told.ms > 1e3 * (idle.ttft(100).seconds + idle.ttft(200).seconds)
    box.gate.set()
    for each in (running, waiting):
        collect(each)


def test_nobody_knows_when_a_place_is_free(box: Box) -> None:
    box.stop()
    started = [box.model.start(request(7 * number, 20)) for number in range(PLACES)]
    assert box.reached.wait(60)
    assert box.model.predicted_ttft(request(50, 20)) is None
    box.gate.set()
    for each in started:
        collect(each)


def test_nothing_is_predicted_of_what_does_not_fit_or_was_not_measured(box: Box) -> None:
    assert box.model.predicted_ttft(request(0, 600)) is None
    unmeasured = Box(None)
    assert unmeasured.model.predicted_ttft(request(0, 100)) is None
    unmeasured.failover.close()
