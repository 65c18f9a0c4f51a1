"""Steps that give NaN: the answers that met it end, others do not, and a device that keeps giving it is put aside."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from devices.errors import DeviceError, EngineError
from edge_runtime.engine import Engine
from edge_runtime.recovery import STRIKES
from edge_runtime.sampling import SamplingParams
from tests.fake_decoder import FakeDecoder
from tests.runtime.helpers import GREEDY, Gate, LetterTokenizer, collect, greedy, prompt, serving, settle
from tests.runtime.machine import Machine, submit
from tests.survive.faulty import POISON, Nonsense, clean, error_of, holds_poison, silent


def test_a_row_without_numbers_ends_its_answer_and_no_other() -> None:
    gate = Gate()
    decoder = Nonsense(before_forward=gate)
    silent(decoder)
    with serving(decoder) as engine:
        first = engine.submit(clean(0, 5), SamplingParams(temperature=0, max_tokens=60))
        assert gate.reached.wait(60)
        decoder.when = holds_poison
        broken = engine.submit([*clean(1, 30), POISON, 1, 2], SamplingParams(temperature=0, n=2, max_tokens=9))
        other = engine.submit(clean(2, 9), GREEDY)
        gate.open.set()
        for answer in collect(broken, 2):
            assert error_of(answer).startswith("fake:cpu: the model's largest logit is nan")
            assert not answer.tokens
        assert collect(first)[0].tokens == greedy(decoder, clean(0, 5), 60)
        assert collect(other)[0].tokens == greedy(decoder, clean(2, 9), 12)
        settle(engine)
        assert not any(holds_poison(sequence) for sequence in decoder.sequences)  # nobody goes on from there


def test_a_request_alone_without_numbers_is_told_from_a_device_that_gives_none() -> None:
    decoder = Nonsense()
    silent(decoder)
    decoder.when = holds_poison
    failover = Machine(decoder, FakeDecoder()).start()
    assert "largest logit is nan" in error_of(collect(submit(failover, [POISON, 1, 2]))[0])
    assert not failover.aside
    decoder.when = lambda sequence: True
    tokens = clean(4, 12)
    assert collect(submit(failover, tokens))[0].tokens == greedy(FakeDecoder(), tokens, 12)
    assert "fake:cpu: the model's largest logit is nan" in failover.aside["fake:0"]
    failover.close()


def test_when_no_row_has_numbers_the_next_device_answers_what_had_sent_nothing() -> None:
    gate = Gate()
    first, second = Nonsense(before_forward=gate), FakeDecoder()
    failover = Machine(first, second).start()
    begun = submit(failover, prompt(0, 5), SamplingParams(temperature=0, max_tokens=40))
    assert gate.reached.wait(60)
    prompts = [prompt(seed, 5 + seed) for seed in range(1, 4)]
    generations = [submit(failover, each) for each in prompts]
    first.when = lambda sequence: len(first.batches) > 4
    gate.open.set()
    assert "largest logit is nan" in error_of(collect(begun)[0])
    for tokens, generation in zip(prompts, generations, strict=True):
        answer = collect(generation)[0]
        if answer.finish_reason == "error":  # it had begun
            assert answer.tokens
        else:
            assert answer.tokens == greedy(second, tokens, 12)
    assert list(failover.aside) == ["fake:0"]
    failover.close()


def test_rows_without_numbers_again_and_again_put_the_device_aside() -> None:
    first, second = Nonsense(), FakeDecoder()
    silent(first)
    silent(second)
    first.when = holds_poison
    failover = Machine(first, second).start()
    answers = [collect(submit(failover, [POISON, seed, 2]))[0] for seed in range(STRIKES)]
    assert [answer.finish_reason for answer in answers] == ["error"] * (STRIKES - 1) + ["length"]
    assert answers[-1].tokens == greedy(second, [POISON, STRIKES - 1, 2], 12)
    assert list(failover.aside) == ["fake:0"]
    failover.close()


def test_without_another_device_numbers_may_come_back() -> None:
    decoder = Nonsense()
    decoder.when = lambda sequence: True
    failover = Machine(decoder).start()
    for seed in range(2 * STRIKES):
        assert "largest logit is nan" in error_of(collect(submit(failover, prompt(seed, 9)))[0])
    decoder.when = lambda sequence: False
    assert collect(submit(failover, prompt(1, 9)))[0].tokens == greedy(decoder, prompt(1, 9), 12)
    failover.close()


@pytest.mark.parametrize("ask", [lambda engine: engine.score([1, 2, 3]), lambda engine: engine.logits([1, 2, 3])])
def test_readings_without_numbers_are_errors(ask: Callable[[Engine], object]) -> None:
    decoder = Nonsense()
    with serving(decoder) as engine:
        decoder.when = lambda sequence: True
        with pytest.raises(DeviceError, match="fake:cpu: the model's largest logit is nan"):
            ask(engine)
        decoder.when = lambda sequence: False


def test_a_device_that_gives_no_numbers_is_not_opened() -> None:
    decoder = Nonsense()
    decoder.when = lambda sequence: True
    with pytest.raises(EngineError, match="largest logit is nan"):
        Engine(decoder, LetterTokenizer())
