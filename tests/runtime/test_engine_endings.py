"""Requests that do not end by themselves (cancelled, failed, refused, closed): nobody waits, nothing is leaked."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import threading
from collections.abc import Sequence

import numpy as np
import pytest

from devices.base import Step
from devices.errors import EngineError
from edge_runtime.engine import Engine
from edge_runtime.errors import EngineStopped, InvalidRequest, Overloaded, PromptTooLong
from edge_runtime.sampling import SamplingParams
from edge_runtime.scheduler import Scheduler, Work
from tests.fake_decoder import FakeDecoder
from tests.runtime.helpers import (
    GREEDY,
    Gate,
    LetterTokenizer,
    ask,
    collect,
    greedy,
    prompt,
    serving,
    settle,
    start,
)


def test_cancel_takes_effect_within_a_step() -> None:
    decoder = FakeDecoder(max_context=4096, kv_tokens=4096)
    with serving(decoder) as engine:
        generation = engine.submit(prompt(1, 5), SamplingParams(temperature=0))
        first = next(iter(generation))
        assert first.finish_reason is None
        gate = Gate()
        decoder.before_forward = gate
        assert gate.reached.wait(60)
        before = len(decoder.batches)
        generation.cancel()
        gate.open.set()
        answer = collect(generation)[0]
        assert len(decoder.batches) <= before + 1
        assert answer.finish_reason == "cancelled"


def test_cancelled_while_waiting() -> None:
    gate = Gate()
    with serving(FakeDecoder(max_sequences=1, before_forward=gate)) as engine:
        first, second = engine.submit(prompt(1, 5), GREEDY), engine.submit(prompt(2, 5), GREEDY)
        second.cancel()
        gate.open.set()
        assert collect(first)[0].finish_reason == "length"
        assert collect(second)[0].finish_reason == "cancelled"


def test_a_forgotten_generation_is_cancelled() -> None:
    decoder = FakeDecoder(max_context=4096, kv_tokens=4096)
    with serving(decoder) as engine:
        generation = engine.submit(prompt(1, 5), SamplingParams(temperature=0))
        next(iter(generation))
        del generation
        gc.collect()
        settle(engine)
        assert engine.stats.running == 0
    assert len(decoder.batches) < 4000


def test_a_closed_generation_gives_nothing_more() -> None:
    with serving(FakeDecoder()) as engine:
        with engine.submit(prompt(1, 5), SamplingParams(n=3, max_tokens=100)) as generation:
            next(iter(generation))
        settle(engine)
        assert list(generation) == []


def test_a_broken_tokenizer_leaves_nobody_waiting() -> None:
    class Broken(LetterTokenizer):
        def decode(self, ids: Sequence[int], skip_special: bool = True, /) -> str:
            raise KeyError(ids[0])

    gate = Gate()
    engine = Engine(FakeDecoder(before_forward=gate), Broken(), vocab_size=64)
    generations = [engine.submit(prompt(seed, 5), GREEDY) for seed in range(3)]
    gate.open.set()
    assert [collect(generation)[0].finish_reason for generation in generations] == ["error"] * 3
    engine.close()


@pytest.mark.parametrize("seed", range(6))
def test_random_cancels_leave_nothing_behind(seed: int) -> None:
    chance = random.Random(seed)
    decoder = FakeDecoder(kv_tokens=160, max_context=120, max_sequences=4)
    with serving(decoder) as engine:
        waiting = []
        for _ in range(30):
            asked = prompt(chance.randrange(4), chance.randrange(1, 60))
            params = SamplingParams(temperature=0, max_tokens=chance.randrange(1, 40), n=chance.choice([1, 1, 3]))
            waiting.append((asked, params, engine.submit(asked, params)))
            if chance.random() < 0.5:
                asked, params, generation = waiting.pop(chance.randrange(len(waiting)))
                for _ in range(chance.randrange(3)):
                    next(iter(generation), None)
                generation.close()
        for asked, params, generation in waiting:
            expected = greedy(decoder, asked, params.max_tokens or 0)
            assert [answer.tokens for answer in collect(generation, params.n)] == [expected] * params.n


def test_a_device_that_fails_ends_the_requests_of_that_step_and_the_engine_goes_on() -> None:
    decoder = FakeDecoder()

    def fail(batch: Sequence[Step]) -> None:
        raise EngineError("the accelerator fell over")

    with serving(decoder) as engine:
        decoder.before_forward = fail
        answers = collect(engine.submit(prompt(1, 20), SamplingParams(temperature=0, n=3, max_tokens=12)), 3)
        for answer in answers:
            assert answer.finish_reason == "error"
            assert answer.last is not None
            with pytest.raises(EngineError, match="fell over"):
                answer.last.checked()
        with pytest.raises(EngineError, match="fell over"):
            engine.score([1, 2, 3])
        decoder.before_forward = lambda batch: None
        assert ask(engine, prompt(1, 20), GREEDY).tokens == greedy(decoder, prompt(1, 20), 12)


def test_broken_logits_end_only_their_request() -> None:
    decoder = FakeDecoder()
    with serving(decoder) as engine:
        healthy = decoder.table.copy()
        decoder.table[:] = np.nan
        answer = ask(engine, prompt(1, 20), SamplingParams(n=2, max_tokens=3))
        assert answer.finish_reason == "error"
        decoder.table[:] = healthy
        assert ask(engine, prompt(1, 20), GREEDY).finish_reason == "length"


def test_the_thread_s_death_reaches_every_waiter(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()

    def die(self: Scheduler) -> list[Work]:
        gate([])
        raise RuntimeError("a bug")

    monkeypatch.setattr(Scheduler, "next", die)
    engine = start(FakeDecoder(max_sequences=1))
    generations = [engine.submit(prompt(seed, 5), SamplingParams(n=2)) for seed in range(3)]
    gate.open.set()
    for generation in generations:
        for answer in collect(generation, 2):
            assert answer.last is not None
            with pytest.raises(EngineStopped, match="RuntimeError: a bug"):
                answer.last.checked()
    with pytest.raises(EngineStopped, match="a bug"):
        engine.submit([1], GREEDY)
    assert not engine.alive
    engine.close()


def test_close_ends_everything() -> None:
    gate = Gate()
    decoder = FakeDecoder(before_forward=gate, max_sequences=1)
    engine = start(decoder)
    generations = [engine.submit(prompt(seed, 5), GREEDY) for seed in range(3)]
    assert gate.reached.wait(60)
    closer = threading.Thread(target=engine.close)
    closer.start()
    gate.open.set()
    closer.join()
    assert [collect(generation)[0].finish_reason for generation in generations] == ["error"] * 3
    assert decoder.closed
    engine.close()
    with pytest.raises(EngineStopped):
        engine.logits([1])


def test_a_full_queue_is_said_so() -> None:
    gate = Gate()
    decoder = FakeDecoder(max_sequences=1, before_forward=gate)
    with serving(decoder, max_queue=2) as engine:
        first = engine.submit(prompt(0, 5), GREEDY)
        assert gate.reached.wait(60)
        others = [engine.submit(prompt(seed, 5), GREEDY) for seed in (1, 2)]
        with pytest.raises(Overloaded, match="2 requests"):
            engine.submit(prompt(3, 5), GREEDY)
        gate.open.set()
        for generation in (first, *others):
            assert collect(generation)[0].finish_reason == "length"


def test_what_does_not_fit_is_refused_with_both_counts() -> None:
    with serving(FakeDecoder(max_context=100, max_prompt=80)) as engine:
        with pytest.raises(PromptTooLong, match=r"81 tokens.* 80"):
            engine.submit([1] * 81, GREEDY)
        with pytest.raises(PromptTooLong, match=r"80 tokens.* 21 more.* 100"):
            engine.submit([1] * 80, SamplingParams(max_tokens=21))
        with pytest.raises(PromptTooLong):
            engine.score([1] * 81)
        with pytest.raises(InvalidRequest, match="no tokens"):
            engine.submit([], GREEDY)
        with pytest.raises(InvalidRequest, match="token 64"):
            engine.submit([64], GREEDY)
        with pytest.raises(InvalidRequest, match="logit_bias"):
            engine.submit([1], SamplingParams(logit_bias={64: 1.0}))


def test_an_event_loop_that_has_gone_does_no_harm() -> None:
    gate = Gate()
    with serving(FakeDecoder(before_forward=gate)) as engine:
        generation = engine.submit(prompt(1, 5), GREEDY)

        async def leave() -> None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(generation.__anext__(), 0.01)

        asyncio.run(leave())
        gate.open.set()
        assert collect(generation)[0].finish_reason in ("cancelled", "length")
