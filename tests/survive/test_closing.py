"""Devices that fail even while they are closed: whoever waits is told, and nothing waits for ever."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from edge_runtime.engine import Engine
from edge_runtime.errors import EngineError
from edge_runtime.sampling import SamplingParams
from edge_runtime.stuck import any_stuck
from tests.fake_decoder import FakeDecoder
from tests.runtime.helpers import Gate, LetterTokenizer, collect, greedy, prompt
from tests.runtime.machine import Failing, Machine, submit
from tests.server.served import wait_until

ERRORS = [lambda: EngineError("an error that sticks"), lambda: RuntimeError("an error that sticks")]


class Sticking(FakeDecoder):
    """Closing it raises."""

    def __init__(self, error: Callable[[], Exception], **more: object) -> None:
        super().__init__(**more)  # type: ignore[arg-type]
        self._error = error

    def close(self) -> None:
        super().close()
        raise self._error()


def ends(work: Callable[[], None]) -> bool:
    """In reasonable time."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(20)
    return not thread.is_alive()


@pytest.mark.parametrize("error", ERRORS, ids=["EngineError", "RuntimeError"])
def test_closing_an_engine_ends(error: Callable[[], Exception], caplog: pytest.LogCaptureFixture) -> None:
    decoder = Sticking(error)
    engine = Engine(decoder, LetterTokenizer(), vocab_size=decoder.vocab_size)
    assert collect(engine.submit(prompt(1, 9), SamplingParams(temperature=0, max_tokens=5)))[0].tokens
    assert ends(engine.close)
    assert decoder.closed
    assert "closing fake:cpu: " in caplog.text
    assert "an error that sticks" in caplog.text


@pytest.mark.parametrize("error", ERRORS, ids=["EngineError", "RuntimeError"])
def test_the_next_device_takes_over_all_the_same(error: Callable[[], Exception]) -> None:
    gate = Gate()
    first, second = Sticking(error, before_forward=gate), FakeDecoder()
    failover = Machine(first, second).start()
    generation = submit(failover, prompt(1, 9), SamplingParams(temperature=0, max_tokens=12))
    assert gate.reached.wait(60)
    first.before_forward = Failing(0)
    gate.open.set()
    waiting = submit(failover, prompt(2, 9), SamplingParams(temperature=0, max_tokens=12))
    for number, each in ((1, generation), (2, waiting)):
        answer = collect(each)[0]
        if answer.finish_reason != "error":  # what was begun may end with it
            assert answer.tokens == greedy(second, prompt(number, 9), 12)
    assert answer.finish_reason == "length"
    assert failover.loaded[0].engine.alive
    assert ends(failover.close)


def test_a_model_that_is_compiled_yet_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_runtime.failover.CLOSING_S", 0.05)
    compiling = threading.Event()
    npu, cpu = FakeDecoder(), FakeDecoder()
    failover = Machine(npu, cpu, compiling=compiling).start()
    assert ends(failover.close)
    assert cpu.closed
    assert any_stuck()
    compiling.set()
    wait_until(lambda: npu.closed and not any_stuck())
