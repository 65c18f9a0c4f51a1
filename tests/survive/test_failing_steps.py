"""Steps that throw: what can be saved is saved, and no answer suffers from another's failure."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import pytest

from devices.base import Step
from devices.errors import ContextOverflow, EngineError
from edge_runtime.engine import Engine
from edge_runtime.recovery import SOUND_STEPS, STRIKES
from edge_runtime.sampling import SamplingParams
from tests.fake_decoder import FakeDecoder, FakeSequence
from tests.runtime.helpers import GREEDY, Answer, Gate, LetterTokenizer, collect, greedy, letter, prompt, serving
from tests.runtime.machine import Machine, submit
from tests.survive.faulty import POISON, Throwing, clean, error_of, poisoned, silent

SEEDED = SamplingParams(temperature=1.0, seed=11, max_tokens=30)


def text_of(answers: Sequence[Answer]) -> list[tuple[str, list[int], str | None]]:
    return [(each.text, each.tokens, each.finish_reason) for each in answers]


def _at(steps: Iterator[int], place: int, batch: Sequence[Step]) -> bool:
    return next(steps) == place


@pytest.mark.parametrize(
    "error",
    [
        lambda: EngineError("it cannot be computed"),
        lambda: RuntimeError("it cannot be computed"),
        lambda: MemoryError("it cannot be computed"),
        lambda: ContextOverflow("it cannot be computed"),
    ],
    ids=["EngineError", "RuntimeError", "MemoryError", "ContextOverflow"],
)
def test_a_request_that_makes_every_step_fail_fails_alone(error: Callable[[], Exception]) -> None:
    gate = Gate()
    decoder = silent(FakeDecoder(before_forward=gate))
    with serving(decoder) as engine:
        first = engine.submit(clean(0, 5), SEEDED)
        assert gate.reached.wait(60)
        prompts = [clean(seed, 6 + 7 * seed) for seed in range(1, 6)]
        prompts[2][3] = POISON
        generations = [engine.submit(each, GREEDY) for each in prompts]
        decoder.before_forward = Throwing(poisoned, error)
        gate.open.set()
        with serving(silent(FakeDecoder())) as healthy:
            expected = text_of(collect(healthy.submit(clean(0, 5), SEEDED)))
        assert text_of(collect(first)) == expected
        for number, generation in enumerate(generations):
            answer = collect(generation)[0]
            if number == 2:
                assert "fake:cpu fails at this request, though not at others" in error_of(answer)
                assert "it cannot be computed" in error_of(answer)
            else:
                assert answer.tokens == greedy(decoder, prompts[number], 12)
        assert engine.alive


def test_poison_that_an_answer_comes_to_in_its_middle_ends_that_answer() -> None:
    decoder = FakeDecoder(before_forward=Throwing(poisoned))
    asked = next(each for each in (clean(seed, 8) for seed in range(99)) if POISON in greedy(decoder, each, 20)[3:19])
    until = greedy(decoder, asked, 20)
    until = until[: until.index(POISON) + 1]
    with serving(decoder) as engine:
        answer = collect(engine.submit(asked, SamplingParams(temperature=0, max_tokens=40)))[0]
        assert answer.tokens == until
        assert answer.text == "".join(letter(token) for token in until)
        assert "at this request" in error_of(answer)


@pytest.mark.parametrize("params", [GREEDY, SEEDED, SamplingParams(seed=3, max_tokens=20, n=3, logprobs=2)])
def test_a_step_that_fails_once_is_noticed_by_nobody(params: SamplingParams) -> None:
    """Neither by the answers that it was to begin nor by those that had been begun."""
    with serving(FakeDecoder()) as healthy:
        prompts = [prompt(seed, 20 + seed) for seed in range(4)]
        expected = [text_of(collect(healthy.submit(each, params), params.n)) for each in prompts]
    for failing in (0, 1, 4, 9, 15):
        steps = iter(range(10**6))
        decoder = FakeDecoder(before_forward=Throwing(partial(_at, steps, failing)))
        with serving(decoder) as engine:
            generations = [engine.submit(each, params) for each in prompts]
            assert [text_of(collect(each, params.n)) for each in generations] == expected
        assert isinstance(decoder.before_forward, Throwing)
        assert decoder.before_forward.thrown == 1


def test_readings_survive_a_failing_step_too() -> None:
    with serving(FakeDecoder()) as healthy:
        expected = healthy.score(prompt(3, 90))
    steps = iter(range(10**6))
    with serving(FakeDecoder(before_forward=Throwing(lambda batch: next(steps) == 3))) as engine:
        np.testing.assert_array_equal(engine.score(prompt(3, 90)), expected)


def test_a_device_that_fails_at_everything_is_given_up_after_one_more_step() -> None:
    failing = Throwing(lambda batch: True)
    second = FakeDecoder()
    failover = Machine(FakeDecoder(before_forward=failing), second).start()
    tokens = prompt(1, 20)
    assert collect(submit(failover, tokens))[0].tokens == greedy(second, tokens, 12)
    assert failing.thrown == 2
    assert "fell over" in failover.aside["fake:0"]
    failover.close()


def test_a_device_with_one_sequence_is_given_up_as_well() -> None:
    """Though the prefix cache has that one: it must give it up for the step that tells."""
    first, second = FakeDecoder(max_sequences=1), FakeDecoder()
    failover = Machine(first, second).start()
    collect(submit(failover, prompt(1, 40)))
    broken = Throwing(lambda batch: True)
    first.before_forward = broken
    tokens = prompt(2, 20)
    assert collect(submit(failover, tokens))[0].tokens == greedy(second, tokens, 12)
    assert list(failover.aside) == ["fake:0"]
    failover.close()


def test_a_device_that_keeps_failing_is_put_aside_though_it_recovers() -> None:
    steps = iter(range(10**6))
    first, second = FakeDecoder(max_context=4096, kv_tokens=8192), FakeDecoder(max_context=4096, kv_tokens=8192)
    first.before_forward = Throwing(lambda batch: next(steps) % 20 == 19)
    failover = Machine(first, second).start()
    answer = collect(submit(failover, prompt(1, 10), SamplingParams(temperature=0, max_tokens=200)))[0]
    assert "fell over" in error_of(answer)
    assert answer.tokens == greedy(first, prompt(1, 10), len(answer.tokens))
    assert first.before_forward.thrown == STRIKES
    assert collect(submit(failover, prompt(2, 10)))[0].tokens == greedy(second, prompt(2, 10), 12)
    assert failover.loaded[0].device == "fake:1"
    failover.close()


def test_failures_long_ago_do_not_count() -> None:
    """One in some hundred steps is survived for ever."""
    steps = iter(range(10**6))
    decoder = FakeDecoder(max_context=4096, kv_tokens=8192)
    decoder.before_forward = Throwing(lambda batch: next(steps) % (SOUND_STEPS + 10) == SOUND_STEPS)
    failover = Machine(decoder, FakeDecoder()).start()
    answer = collect(submit(failover, prompt(1, 10), SamplingParams(temperature=0, max_tokens=1500)))[0]
    assert answer.tokens == greedy(decoder, prompt(1, 10), 1500)
    assert decoder.before_forward.thrown > STRIKES
    assert not failover.aside
    failover.close()


def test_poison_sent_again_and_again_does_not_put_the_device_aside() -> None:
    decoder = silent(FakeDecoder())
    decoder.before_forward = Throwing(poisoned)
    failover = Machine(decoder, FakeDecoder()).start()
    for seed in range(3 * STRIKES):
        assert "at this request" in error_of(collect(submit(failover, [*clean(seed, 7), POISON]))[0])
    assert not failover.aside
    assert collect(submit(failover, clean(1, 9)))[0].tokens == greedy(decoder, clean(1, 9), 12)
    failover.close()


def test_where_forking_fails_it_is_computed_anew() -> None:
    class Stiff(FakeSequence):
        def fork(self, length: int) -> FakeSequence:
            raise EngineError("the copy failed")

    class Copying(FakeDecoder):
        def open_sequence(self, long_rope: bool) -> FakeSequence:
            super().open_sequence(long_rope)
            self.sequences[-1] = Stiff(self, long_rope)
            return self.sequences[-1]

    decoder = Copying()
    with serving(decoder) as engine:
        for _ in range(2):
            answers = collect(engine.submit(prompt(1, 30), SamplingParams(temperature=0, n=2, max_tokens=12)), 2)
            assert [answer.tokens for answer in answers] == [greedy(decoder, prompt(1, 30), 12)] * 2


def test_a_cache_full_of_prefixes_makes_room_for_the_step_that_tells() -> None:
    decoder = silent(FakeDecoder(max_sequences=2, kv_tokens=160, max_context=150))
    with serving(decoder) as engine:
        for seed in range(2):
            collect(engine.submit(clean(seed, 60), GREEDY))
        decoder.before_forward = Throwing(poisoned)
        assert "at this request" in error_of(collect(engine.submit([*clean(3, 60), POISON], GREEDY))[0])
        assert collect(engine.submit(clean(4, 60), GREEDY))[0].tokens == greedy(decoder, clean(4, 60), 12)


def test_a_device_that_gives_out_no_sequences_is_put_aside() -> None:
    class Full(FakeDecoder):
        broken = False

        def open_sequence(self, long_rope: bool) -> FakeSequence:
            if self.broken:
                raise EngineError("no memory on the device")
            return super().open_sequence(long_rope)

    first, second = Full(), FakeDecoder()
    failover = Machine(first, second).start()
    assert collect(submit(failover, prompt(1, 9)))[0].finish_reason == "length"
    first.broken = True
    assert collect(submit(failover, prompt(2, 9)))[0].tokens == greedy(second, prompt(2, 9), 12)
    assert failover.aside == {"fake:0": "it failed (no memory on the device)"}
    failover.close()


def test_a_request_that_gets_no_sequence_fails_alone() -> None:
    class Choosy(FakeDecoder):
        def new_sequence(self, expected: int = 0) -> FakeSequence:
            if expected > 40:
                raise EngineError("no memory for so long a one")
            return super().new_sequence(expected)

    with serving(Choosy()) as engine:
        generations = [engine.submit(prompt(seed, length), GREEDY) for seed, length in enumerate((9, 60, 12))]
        answers = [collect(each)[0] for each in generations]
        assert [answer.finish_reason for answer in answers] == ["length", "error", "length"]
        assert "at this request" in error_of(answers[1])


@pytest.mark.parametrize("seed", range(8))
def test_random_failures_change_no_answer_and_leave_nothing_behind(seed: int) -> None:
    chance = random.Random(seed)
    decoder = FakeDecoder(kv_tokens=200, max_context=120, max_sequences=4, crop_step=chance.choice([1, 4]))
    decoder.before_forward = Throwing(lambda batch: chance.random() < 0.03)
    waiting = []
    with serving(decoder) as engine:
        for _ in range(25):
            asked = prompt(chance.randrange(5), chance.randrange(1, 70))
            params = SamplingParams(temperature=0, max_tokens=chance.randrange(1, 40), n=chance.choice([1, 1, 3]))
            waiting.append((asked, params, engine.submit(asked, params)))
            if chance.random() < 0.3:
                waiting.pop(chance.randrange(len(waiting)))[2].close()
        ended = []
        for asked, params, generation in waiting:
            expected = greedy(decoder, asked, params.max_tokens or 0)
            for answer in collect(generation, params.n):
                assert answer.tokens == expected[: len(answer.tokens)]
                assert answer.text == "".join(letter(token) for token in answer.tokens)
                ended.append(answer.finish_reason)
        assert ended.count("length") > len(ended) / 2
        decoder.before_forward = lambda batch: None


def test_a_bug_that_one_answer_meets_ends_only_that(caplog: pytest.LogCaptureFixture) -> None:
    class Tokens(LetterTokenizer):
        def decode(self, ids: Sequence[int], skip_special: bool = True, /) -> str:
            if POISON in ids:
                raise KeyError(POISON)
            return super().decode(ids, skip_special)

    decoder = FakeDecoder()
    met = next(each for each in (clean(seed, 8) for seed in range(99)) if POISON in greedy(decoder, each, 12))
    other = next(each for each in (clean(seed, 9) for seed in range(99)) if POISON not in greedy(decoder, each, 12))
    with Engine(decoder, Tokens(), vocab_size=64) as engine:
        both = engine.submit(met, GREEDY), engine.submit(other, GREEDY)
        assert "KeyError: 63" in error_of(collect(both[0])[0])
        assert collect(both[1])[0].tokens == greedy(decoder, other, 12)
    assert "an answer could not go on" in caplog.text


def test_steps_are_batches_of_many_again_once_the_fault_is_over() -> None:
    gate, failed = Gate(), iter([True])
    decoder = FakeDecoder(before_forward=gate)
    with serving(decoder) as engine:
        generations = [engine.submit(prompt(seed, 9), GREEDY) for seed in range(4)]
        assert gate.reached.wait(60)

        def once(batch: Sequence[Step]) -> bool:
            return len(batch) == 4 and next(failed, False)

        decoder.before_forward = Throwing(once)
        gate.open.set()
        for seed, generation in enumerate(generations):
            assert collect(generation)[0].tokens == greedy(decoder, prompt(seed, 9), 12)
        sizes = [len(batch) for batch in decoder.batches]
        assert decoder.before_forward.thrown == 1
        assert 4 in sizes[sizes.index(4) + 1 :]
