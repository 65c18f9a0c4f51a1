"""Which type of KV cache a request gets, and that it keeps it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from devices.base import DecoderLimits, KVChoice
from devices.kv_types import KVType
from edge_runtime.engine import Engine
from edge_runtime.errors import PromptTooLong
from edge_runtime.precision import AGREEMENT, FAITHFUL, LONG, PrecisionManager
from edge_runtime.sampling import SamplingParams
from tests.fake_decoder import FakeDecoder, FakeSequence
from tests.runtime.helpers import GREEDY, Gate, LetterTokenizer, ask, collect, greedy, prompt

CHOICES = (KVChoice("float16", 8), KVChoice("int8", 4))


class Choosing(FakeDecoder):
    """Notes the type of each sequence that was opened, not forked."""

    def __init__(self, *, kv_tokens: int = 8192, max_context: int = 8000, max_sequences: int = 8) -> None:
        super().__init__(
            kv_tokens=2 * kv_tokens, max_context=max_context, max_sequences=max_sequences, prefill_chunk=512
        )
        self.limits: DecoderLimits = replace(self.limits, kv_tokens=kv_tokens, kv_choices=CHOICES)
        self.opened: list[KVType] = []

    def new_sequence_in(self, kv_type: KVType, expected: int = 0) -> FakeSequence:
        self.opened.append(kv_type)
        return self.new_sequence(expected)


def start(decoder: Choosing) -> Engine:
    return Engine(decoder, LetterTokenizer(), vocab_size=decoder.vocab_size)


@pytest.mark.parametrize(
    ("tokens", "free", "begun", "expected"),
    [
        (100, 1 << 20, None, "float16"),
        (LONG - 1, 1 << 20, None, "float16"),
        (LONG, 1 << 20, None, "int8"),
        (LONG, 1 << 20, "float16", "float16"),  # most of it is known already
        (100, 799, None, "int8"),
        (100, 800, None, "float16"),
        (100, 799, "float16", "int8"),
        (100, 1 << 20, "int8", "int8"),
        (100, 10, None, "int8"),  # it waits for room
    ],
)
def test_the_choice(tokens: int, free: int, begun: KVType | None, expected: KVType) -> None:
    limits = replace(FakeDecoder().limits, kv_choices=CHOICES)
    assert PrecisionManager(limits).choose(tokens, free, begun) == expected


def test_a_type_that_loses_answers_is_taken_only_for_want_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AGREEMENT, "int8", FAITHFUL - 0.001)
    manager = PrecisionManager(replace(FakeDecoder().limits, kv_choices=CHOICES))
    assert manager.choose(LONG, 1 << 20) == "float16"
    assert manager.choose(LONG, 8 * LONG - 1) == "int8"


def test_long_prompts_take_the_smaller_type() -> None:
    decoder = Choosing()
    with start(decoder) as engine:
        for length in (20, LONG + 5, 21):
            tokens = prompt(length, length)
            assert ask(engine, tokens, GREEDY).tokens == greedy(decoder, tokens, 12)
        assert decoder.opened == ["float16", "int8", "float16"]
        ask(engine, [*prompt(20, 20), *prompt(1, 15)], GREEDY)  # goes on from a sequence of its type
        assert decoder.opened == ["float16", "int8", "float16"]


def test_prefixes_are_not_shared_between_types() -> None:
    decoder = Choosing()
    with start(decoder) as engine:
        tokens = prompt(1, LONG + 600)
        ask(engine, tokens[:600], GREEDY)
        generation = engine.submit(tokens, GREEDY)
        collect(generation)
        assert generation.usage.cached_tokens == 0
        generation = engine.submit(tokens[: LONG + 500], GREEDY)
        collect(generation)
        assert generation.usage.cached_tokens >= LONG + 490
        assert decoder.opened == ["float16", "int8"]


def test_a_conversation_that_has_grown_keeps_its_type() -> None:
    decoder = Choosing()
    with start(decoder) as engine:
        tokens = prompt(1, LONG + 100)
        ask(engine, tokens[: LONG - 50], GREEDY)
        generation = engine.submit(tokens, GREEDY)
        collect(generation)
        assert generation.usage.cached_tokens >= LONG - 52
        assert decoder.opened == ["float16"]


def test_where_memory_is_short_more_requests_run_at_once() -> None:
    """Two of 100 tokens fill 220 of float16; the third fits in what is left only as int8."""
    decoder, gate = Choosing(kv_tokens=270), Gate()
    decoder.before_forward = gate
    with start(decoder) as engine:
        waiting = [engine.submit(prompt(seed, 100), SamplingParams(temperature=0, max_tokens=5)) for seed in range(3)]
        gate.open.set()
        for seed, generation in enumerate(waiting):
            assert collect(generation)[0].tokens == greedy(decoder, prompt(seed, 100), 5)
    assert decoder.opened == ["float16", "float16", "int8"]


def test_a_prompt_may_be_as_long_as_the_smallest_type_holds() -> None:
    decoder = Choosing(kv_tokens=100, max_context=1000)
    with start(decoder) as engine:
        assert ask(engine, prompt(1, 150), GREEDY).tokens == greedy(decoder, prompt(1, 150), 12)
        assert decoder.opened == ["int8"]
        with pytest.raises(PromptTooLong, match="have 200"):
            engine.submit(prompt(1, 199), GREEDY)


def test_a_request_keeps_its_type_when_it_is_computed_again() -> None:
    """Preempted by the older one, when there is room again for float16 at first sight."""
    decoder, gate = Choosing(kv_tokens=200), Gate()
    decoder.before_forward = gate  # one that came when the others had grown would be int8
    with start(decoder) as engine:
        params = SamplingParams(temperature=0, max_tokens=90)
        waiting = [engine.submit(prompt(seed, 60), params) for seed in range(3)]
        gate.open.set()
        for seed, generation in enumerate(waiting):
            assert collect(generation)[0].tokens == greedy(decoder, prompt(seed, 60), 90)
        assert engine.stats.preemptions > 0
    first = decoder.opened[:3]
    assert first == ["float16", "float16", "float16"]
    assert set(decoder.opened[3:]) == {"float16"}


def test_completions_of_one_prompt_have_one_type() -> None:
    decoder = Choosing(max_sequences=2)
    with start(decoder) as engine:
        tokens = prompt(1, LONG)
        answers = collect(engine.submit(tokens, SamplingParams(temperature=0, max_tokens=4, n=4)), 4)
        assert [answer.tokens for answer in answers] == [greedy(decoder, tokens, 4)] * 4
    assert set(decoder.opened) == {"int8"}


def test_readings_choose_too() -> None:
    decoder = Choosing()
    with start(decoder) as engine:
        engine.score(prompt(1, LONG))
        engine.logits(prompt(1, 10))
    assert decoder.opened == ["int8", "float16"]
