"""The engine over the fake decoder: what is answered, and in what order."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import numpy as np
import pytest

from devices.base import Step
from edge_runtime.engine import Engine
from edge_runtime.errors import Overloaded, PromptTooLong
from edge_runtime.request import Usage
from edge_runtime.sampling import SamplingParams
from tests.fake_decoder import FakeDecoder
from tests.runtime.helpers import (
    GREEDY,
    Gate,
    LetterTokenizer,
    ask,
    collect,
    greedy,
    letter,
    prompt,
    serving,
)
from tests.server.served import wait_until


def test_the_answer_is_that_of_the_model() -> None:
    decoder = FakeDecoder()
    with serving(decoder) as engine:
        asked = prompt(1, 50)
        answer = ask(engine, asked, GREEDY)
    assert answer.tokens == greedy(decoder, asked, 12)
    assert answer.text == "".join(map(letter, answer.tokens))
    assert answer.finish_reason == "length"
    assert answer.last is not None
    assert answer.last.usage == Usage(50, 12, 0)


@pytest.mark.parametrize("max_sequences", [1, 3, 8])
def test_eight_at_once_answer_as_if_alone(max_sequences: int) -> None:
    gate = Gate()
    decoder = FakeDecoder(max_sequences=max_sequences, before_forward=gate)
    prompts = [prompt(seed, 5 + 9 * seed) for seed in range(8)]
    params = SamplingParams(temperature=0, max_tokens=60)
    with serving(decoder) as engine:
        generations = [engine.submit(tokens, params) for tokens in prompts]
        gate.open.set()
        answers = [collect(generation)[0].tokens for generation in generations]
    assert answers == [greedy(decoder, tokens, 60) for tokens in prompts]
    assert max(len(batch) for batch in decoder.batches) == max_sequences


def test_a_long_prompt_holds_nobody_back_for_more_than_a_chunk() -> None:
    gate = Gate()
    decoder = FakeDecoder(prefill_chunk=16, before_forward=gate)
    with serving(decoder) as engine:
        short = engine.submit(prompt(1, 3), SamplingParams(temperature=0, max_tokens=40))
        assert gate.reached.wait(60)
        long = engine.submit(prompt(2, 160), GREEDY)
        gate.open.set()
        collect(short)
        collect(long)
    mixed = [batch for batch in decoder.batches if any(tokens == 16 for tokens, _ in batch)]
    assert len(mixed) == 10
    assert all(len(batch) == 2 and (1, 1) in batch for batch in mixed), "a chunk ran without the decoding row"


def test_prompts_are_served_in_order() -> None:
    gate = Gate()
    begun: list[int] = []

    def watch(batch: Sequence[Step]) -> None:
        gate(batch)
        begun.extend(int(step.tokens[0]) for step in batch if step.sequence.length == 0)

    with serving(FakeDecoder(max_sequences=2, before_forward=watch), prefix_cache_bytes=0) as engine:
        generations = [engine.submit([first, *prompt(first, 40)], GREEDY) for first in range(1, 7)]
        gate.open.set()
        for generation in generations:
            collect(generation)
        assert begun == [1, 2, 3, 4, 5, 6]


def test_preemption_loses_nothing() -> None:
    gate = Gate()
    decoder = FakeDecoder(kv_tokens=96, max_context=96, max_sequences=4, before_forward=gate)
    params = SamplingParams(temperature=0.8, seed=5, max_tokens=50)
    prompts = [prompt(seed, 20) for seed in range(4)]
    roomy = FakeDecoder(max_context=96)
    with serving(roomy, prefix_cache_bytes=0) as engine:
        alone = [ask(engine, tokens, params).tokens for tokens in prompts]
    with serving(decoder) as engine:
        generations = [engine.submit(tokens, params) for tokens in prompts]
        gate.open.set()
        answers = [collect(generation)[0] for generation in generations]
        assert engine.stats.preemptions > 0
    assert [answer.tokens for answer in answers] == alone
    assert {answer.finish_reason for answer in answers} == {"length"}


def test_when_memory_is_short_prefixes_go_first_then_requests_wait_then_they_are_refused() -> None:
    gate = Gate()
    decoder = FakeDecoder(kv_tokens=96, max_context=96)
    params = SamplingParams(temperature=0, max_tokens=20)
    with serving(decoder, max_queue=1) as engine:
        ask(engine, prompt(1, 20), params)
        assert engine.stats.cached_tokens > 0
        decoder.before_forward = gate
        running = engine.submit(prompt(2, 60), params)
        assert gate.reached.wait(60)
        waiting = engine.submit(prompt(3, 60), params)
        with pytest.raises(Overloaded) as refused:
            engine.submit(prompt(4, 60), params)
        assert refused.value.retry_after > 0
        gate.open.set()
        assert collect(running)[0].finish_reason == collect(waiting)[0].finish_reason == "length"
        assert engine.stats.preemptions == 0
        assert engine.stats.cached_sequences == 1  # the last; the first ones gave way
    assert max(len(batch) for batch in decoder.batches) == 1  # no two at once


def test_one_sequence_may_fill_the_whole_cache() -> None:
    decoder = FakeDecoder(kv_tokens=32, max_context=64)
    with serving(decoder) as engine:
        answer = ask(engine, prompt(3, 10), SamplingParams(temperature=0))
        with pytest.raises(PromptTooLong, match=r"10 tokens.* 40 more.* 32"):
            engine.submit(prompt(3, 10), SamplingParams(max_tokens=40))
    assert answer.tokens == greedy(decoder, prompt(3, 10), 22)
    assert answer.finish_reason == "length"


@pytest.mark.parametrize("length", [1, 3, 8])
def test_stop_strings_cross_tokens_and_are_not_shown(length: int) -> None:
    decoder = FakeDecoder()
    asked = prompt(7, 10)
    expected = greedy(decoder, asked, 12)
    stop = "".join(map(letter, expected[12 - length :]))
    with serving(decoder) as engine:
        chunks = list(engine.submit(asked, SamplingParams(temperature=0, max_tokens=30, stop=("never", stop))))
    text = "".join(chunk.text for chunk in chunks)
    assert text == "".join(map(letter, expected))[: 12 - length]
    assert chunks[-1].finish_reason == "stop"
    assert [token for chunk in chunks for token in chunk.token_ids] == expected


def test_text_held_for_a_stop_string_that_never_ends_is_given_at_the_end() -> None:
    decoder = FakeDecoder()
    expected = greedy(decoder, prompt(7, 10), 12)
    stop = letter(expected[-1]) + "never"
    with serving(decoder) as engine:
        answer = ask(engine, prompt(7, 10), SamplingParams(temperature=0, max_tokens=12, stop=(stop,)))
    assert answer.text == "".join(map(letter, expected))
    assert answer.finish_reason == "length"


def test_eos_and_stop_tokens() -> None:
    decoder = FakeDecoder()
    expected = greedy(decoder, prompt(7, 10), 12)
    fifth = expected[4]
    cut = expected[: expected.index(fifth) + 1]
    with serving(decoder) as engine:
        by_eos = ask(engine, prompt(7, 10), GREEDY, [fifth])
        by_id = ask(engine, prompt(7, 10), SamplingParams(temperature=0, max_tokens=12, stop_token_ids=(fifth,)))
        ignored = ask(engine, prompt(7, 10), SamplingParams(temperature=0, max_tokens=12, ignore_eos=True), [fifth])
    for answer in (by_eos, by_id):
        assert answer.tokens == cut
        assert answer.text == "".join(map(letter, cut[:-1]))
        assert answer.finish_reason == "stop"
    assert ignored.tokens == expected


@pytest.mark.parametrize("max_sequences", [1, 2, 8])
def test_n_completions_share_the_prompt(max_sequences: int) -> None:
    asked = prompt(9, 40)
    params = SamplingParams(temperature=1.0, seed=11, n=4, max_tokens=8)
    decoder = FakeDecoder(max_sequences=max_sequences)
    with serving(decoder) as engine:
        generation = engine.submit(asked, params)
        answers = collect(generation, 4)
        assert generation.usage == Usage(40, 32, 0)
    with serving(FakeDecoder()) as engine:
        again = collect(engine.submit(asked, params), 4)
        single = ask(engine, asked, SamplingParams(temperature=1.0, seed=11, max_tokens=8))
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in again]
    assert single.tokens == answers[0].tokens
    assert len({tuple(answer.tokens) for answer in answers}) == 4
    with_usage = [answer for answer in answers if answer.last is not None and answer.last.usage is not None]
    assert len(with_usage) == 1
    if max_sequences == 8:
        assert sum(tokens for batch in decoder.batches for tokens, _ in batch if tokens > 1) == 40


def test_a_seed_gives_the_same_tokens_in_any_batch() -> None:
    params = SamplingParams(temperature=1.2, top_p=0.9, seed=3, max_tokens=12)
    with serving(FakeDecoder()) as engine:
        alone = ask(engine, prompt(1, 20), params).tokens
    with serving(FakeDecoder()) as engine:
        others = [engine.submit(prompt(seed, 30), SamplingParams(max_tokens=30)) for seed in range(2, 6)]
        assert ask(engine, prompt(1, 20), params).tokens == alone
        for other in others:
            collect(other)


def test_longrope_is_computed_anew_at_the_switch() -> None:
    decoder = FakeDecoder(rope_switch=32, max_context=128)
    with serving(decoder) as engine:
        crossing = engine.submit(prompt(1, 28), GREEDY)
        other = engine.submit(prompt(2, 10), GREEDY)
        long = engine.submit(prompt(3, 50), GREEDY)
        again = ask(engine, prompt(3, 50), GREEDY)
        answers = [collect(generation)[0].tokens for generation in (crossing, other, long)]
    assert answers == [greedy(decoder, prompt(seed, n), 12, 32) for seed, n in ((1, 28), (2, 10), (3, 50))]
    assert again.tokens == answers[2]


def test_the_next_turn_comes_from_the_cache() -> None:
    decoder = FakeDecoder(max_sequences=2)
    with serving(decoder) as engine:
        first = ask(engine, prompt(1, 40), GREEDY)
        turn = [*prompt(1, 40), *first.tokens, *prompt(2, 5)]
        second = ask(engine, turn, GREEDY)
        branch = [*prompt(1, 40), *prompt(5, 10)]
        third = ask(engine, branch, GREEDY)
    assert second.tokens == greedy(decoder, turn, 12)
    assert third.tokens == greedy(decoder, branch, 12)
    assert second.last is not None
    assert second.last.usage == Usage(57, 12, 51)
    assert third.last is not None
    assert third.last.usage == Usage(50, 12, 40)


def test_a_coarse_crop_is_fed_again() -> None:
    decoder = FakeDecoder(max_sequences=1, crop_step=8)
    with serving(decoder) as engine:
        ask(engine, prompt(1, 40), GREEDY)
        branch = [*prompt(1, 30), *prompt(5, 10)]
        answer = ask(engine, branch, GREEDY)
    assert answer.tokens == greedy(decoder, branch, 12)
    assert answer.last is not None
    assert answer.last.usage == Usage(40, 12, 24)


def test_score_and_logits_while_others_run() -> None:
    decoder = FakeDecoder(prefill_chunk=16)
    ids = prompt(4, 50)
    with serving(decoder) as engine:
        other = engine.submit(prompt(1, 10), SamplingParams(temperature=0, max_tokens=100))
        scores, logits = engine.score(ids), engine.logits(ids)
        collect(other)
        assert engine.score([5]).shape == (0,)
    rows = all_rows(ids)
    assert np.array_equal(logits, rows[-1])
    exact = rows.astype(np.float64)
    log_p = exact - np.log(np.exp(exact).sum(axis=1, keepdims=True))
    expected = log_p[np.arange(49), ids[1:]]
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, atol=1e-5)


def all_rows(ids: Sequence[int]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    decoder = FakeDecoder(prefill_chunk=64)
    return decoder.forward([Step(decoder.new_sequence(), np.asarray(ids), len(ids))])[0]


def test_from_an_event_loop() -> None:
    decoder = FakeDecoder(max_context=4096, kv_tokens=4096)
    with serving(decoder) as engine:

        async def read(seed: int) -> list[int]:
            return [token async for chunk in engine.submit(prompt(seed, 20), GREEDY) for token in chunk.token_ids]

        async def everything() -> list[list[int]]:
            endless = engine.submit(prompt(9, 5), SamplingParams(temperature=0))
            answers = await asyncio.gather(*(read(seed) for seed in range(6)))
            endless.cancel()
            reasons = [chunk.finish_reason async for chunk in endless]
            assert reasons[-1] == "cancelled"
            return answers

        answers = asyncio.run(everything())
    assert answers == [greedy(decoder, prompt(seed, 20), 12) for seed in range(6)]


def test_logprobs_come_with_their_tokens() -> None:
    with serving(FakeDecoder()) as engine:
        chunks = list(engine.submit(prompt(1, 5), SamplingParams(temperature=0, max_tokens=6, logprobs=2)))
    for chunk in chunks:
        assert [entry.token_id for entry in chunk.logprobs] == list(chunk.token_ids)
        for entry in chunk.logprobs:
            assert entry.top[0] == (entry.token_id, entry.logprob)
            assert len(entry.top) == 2


def test_the_vocabulary_is_learned_by_a_first_token() -> None:
    decoder = FakeDecoder(vocab_size=40)
    engine = Engine(decoder, LetterTokenizer())
    assert engine.vocab_size == 40
    assert not decoder.sequences
    engine.close()


def test_memory_of_busier_times_is_given_back_once_it_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_runtime.engine.TRIM_S", 0.01)
    trimmed: list[int] = []

    class Trimmed(FakeDecoder):
        def trim(self) -> None:
            trimmed.append(len(self.batches))

    with Engine(Trimmed(), LetterTokenizer(), vocab_size=64) as engine:
        for turn in (1, 2):
            list(engine.submit([1, 2, 3], SamplingParams(max_tokens=3)))
            wait_until(lambda turn=turn: len(trimmed) >= turn)
            time.sleep(0.05)
            assert len(trimmed) == turn  # not again and again


def test_whoever_looks_while_a_sequence_is_closed_sees_none() -> None:
    """The engine's thread lets go of requests whenever it likes."""
    gate = Gate()
    with serving(FakeDecoder(before_forward=gate)) as engine:
        generation = engine.submit([1, 2, 3, 4], GREEDY)
        assert gate.reached.wait(60)
        (request,) = engine._scheduler.running
        own, request.sequence = request.sequence, FakeDecoder().new_sequence()
        request.sequence.close()
        stats, used = engine.stats, engine.kv_bytes_used
        request.sequence = own
        assert (stats.running, stats.running_tokens, stats.pending, used) == (1, 0, (4,), 0)
        gate.open.set()
        generation.close()
