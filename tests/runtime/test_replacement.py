"""Another engine takes over between requests: what was begun ends as it was begun, and nobody else notices."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import pytest

from devices.base import Step
from devices.errors import EngineError
from edge_runtime.engine import Engine
from edge_runtime.errors import EngineStopped
from edge_runtime.sampling import SamplingParams
from tests.fake_decoder import FakeDecoder
from tests.runtime.helpers import GREEDY, Gate, LetterTokenizer, collect, greedy, prompt, start

LONG = SamplingParams(temperature=0, max_tokens=40)


def replacing(engine: Engine, open_successor: Callable[[], Engine]) -> Future[None]:
    """On another thread; begun when this returns."""
    done: Future[None] = Future()

    def replace() -> None:
        try:
            engine.replace(open_successor)
        except Exception as error:
            done.set_exception(error)
        else:
            done.set_result(None)

    threading.Thread(target=replace).start()
    while engine._estate.wanted is None:
        pass
    return done


def test_what_was_begun_ends_and_the_rest_is_answered_by_the_other() -> None:
    gate = Gate()
    old, new = FakeDecoder(max_sequences=1, before_forward=gate), FakeDecoder()
    engine, opened = start(old), []
    first = engine.submit(prompt(1, 5), LONG)
    assert gate.reached.wait(60)
    waiting = [engine.submit(prompt(seed, 5), GREEDY) for seed in (2, 3)]

    def open_new() -> Engine:
        assert old.closed  # there is not memory for both
        opened.append(start(new))
        return opened[0]

    done = replacing(engine, open_new)
    waiting.append(engine.submit(prompt(4, 5), GREEDY))
    assert not done.done()
    gate.open.set()
    done.result(60)
    assert collect(first)[0].tokens == greedy(old, prompt(1, 5), 40)
    for seed, generation in zip((2, 3, 4), waiting, strict=True):
        assert collect(generation)[0].tokens == greedy(new, prompt(seed, 5), 12)
    assert not engine.alive
    with pytest.raises(EngineStopped, match=r"fake:cpu was replaced, and another has taken over"):
        engine.submit(prompt(5, 5), GREEDY)
    opened[0].close()


def test_an_idle_engine_is_replaced_at_once() -> None:
    engine, new = start(FakeDecoder()), FakeDecoder()
    successors: list[Engine] = []

    def open_new() -> Engine:
        successors.append(start(new))
        return successors[0]

    engine.replace(open_new)
    assert collect(successors[0].submit(prompt(1, 5), GREEDY))[0].tokens == greedy(new, prompt(1, 5), 12)
    with pytest.raises(ValueError, match="to take over already"):
        engine.replace(open_new)
    successors[0].close()


def test_several_completions_and_readings_move_whole() -> None:
    gate = Gate()
    old, new = FakeDecoder(max_sequences=1, before_forward=gate), FakeDecoder()
    engine = start(old)
    begun = engine.submit(prompt(1, 5), GREEDY)
    assert gate.reached.wait(60)
    several = engine.submit(prompt(2, 5), SamplingParams(temperature=0, max_tokens=12, n=3))
    successors: list[Engine] = []

    def open_new() -> Engine:
        successors.append(start(new))
        return successors[0]

    done = replacing(engine, open_new)
    gate.open.set()
    done.result(60)
    assert collect(begun)[0].tokens == greedy(old, prompt(1, 5), 12)
    assert [answer.tokens for answer in collect(several, 3)] == [greedy(new, prompt(2, 5), 12)] * 3
    successors[0].close()


def test_when_the_other_does_not_open_everybody_is_told() -> None:
    gate = Gate()
    engine = start(FakeDecoder(max_sequences=1, before_forward=gate))
    begun = engine.submit(prompt(1, 5), GREEDY)
    assert gate.reached.wait(60)
    waiting = engine.submit(prompt(2, 5), GREEDY)

    def refuse() -> Engine:
        raise EngineError("no room for it")

    done = replacing(engine, refuse)
    gate.open.set()
    with pytest.raises(EngineError, match="no room for it"):
        done.result(60)
    assert collect(begun)[0].finish_reason == "length"
    last = collect(waiting)[0].last
    assert last is not None
    assert "nothing takes its place: no room for it" in str(last.error)


def test_closing_meanwhile() -> None:
    gate = Gate()
    engine = start(FakeDecoder(before_forward=gate))
    begun = engine.submit(prompt(1, 5), GREEDY)
    assert gate.reached.wait(60)
    done = replacing(engine, lambda: pytest.fail("nobody takes over"))
    closing = threading.Thread(target=engine.close)
    closing.start()
    while engine.alive:
        pass
    gate.open.set()
    with pytest.raises(EngineStopped, match="closed"):
        done.result(60)
    closing.join(60)
    assert collect(begun)[0].finish_reason == "error"


def test_the_device_fails_meanwhile() -> None:
    """Its successor takes over then, which is not the one that was to."""
    gate, other = Gate(), FakeDecoder()
    successors: list[Engine] = []

    def fail(batch: Sequence[Step]) -> None:
        gate(batch)
        raise EngineError("pulled out")

    def next_device(error: EngineError) -> Callable[[], Engine]:
        def open_next() -> Engine:
            successors.append(start(other))
            return successors[0]

        return open_next

    engine = Engine(FakeDecoder(before_forward=fail), LetterTokenizer(), vocab_size=64, successor=next_device)
    begun = engine.submit(prompt(1, 5), GREEDY)
    assert gate.reached.wait(60)
    done = replacing(engine, lambda: pytest.fail("not this one"))
    gate.open.set()
    with pytest.raises(EngineStopped, match="pulled out"):
        done.result(60)
    assert collect(begun)[0].tokens == greedy(other, prompt(1, 5), 12)
    successors[0].close()
