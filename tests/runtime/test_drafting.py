"""Answers with drafts are those without, in fewer steps."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_runtime.engine import Engine, EngineStats
from edge_runtime.sampling import SamplingParams
from tests.fake_decoder import FakeDecoder, FakeSequence
from tests.runtime.helpers import Answer, LetterTokenizer, collect, letter

CYCLE = 11


class Repeating(FakeDecoder):
    """Logits hang on the newest token alone and prefer the one after it on a circle: it repeats itself."""

    def _logits(self, sequence: FakeSequence) -> NDArray[np.float32]:
        rows: NDArray[np.float32] = self.table[sequence.tokens()].copy()
        rows[np.arange(len(rows)), (sequence.tokens() + 1) % CYCLE] += 5
        return rows


def run(decoder: FakeDecoder, prompts: list[list[int]], params: SamplingParams, drafting: bool) -> list[list[Answer]]:
    """All completions of all prompts, submitted at once. Nothing may be left behind."""
    with Engine(decoder, LetterTokenizer(), vocab_size=decoder.vocab_size, prompt_lookup=drafting) as engine:
        generations = [engine.submit(prompt, params) for prompt in prompts]
        answers = [collect(generation, params.n) for generation in generations]
        engine.logits([0])
        stats: EngineStats = engine.stats
        decoder.check_integrity()
    assert (stats.drafted_tokens > 0) <= drafting
    assert stats.accepted_tokens <= stats.drafted_tokens
    assert stats.generated_tokens == sum(len(answer.tokens) for each in answers for answer in each)
    for each in answers:
        for answer in each:
            answer.last = None  # it has times and usage
    return answers


PROMPTS = [[1, 2, 3, 4, 5, 6] * 2, [40, 41, 42, 7, 8] * 3, [9] * 30]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0, max_tokens=60),
        SamplingParams(temperature=1, seed=3, max_tokens=60),
        SamplingParams(temperature=1, seed=4, n=3, max_tokens=40),
        SamplingParams(temperature=0, max_tokens=60, repetition_penalty=1.05, frequency_penalty=0.1),
        SamplingParams(temperature=0, max_tokens=60, logprobs=2),
        SamplingParams(temperature=0, max_tokens=60, stop=(letter(5) + letter(6),)),
        SamplingParams(temperature=0, max_tokens=60, stop_token_ids=(4,)),
        SamplingParams(temperature=0, max_tokens=1),
        SamplingParams(temperature=0, max_tokens=2),
    ],
)
@pytest.mark.parametrize("count", [1, 3])
def test_the_answer_is_that_of_plain_decoding(params: SamplingParams, count: int) -> None:
    plain, drafted = Repeating(), Repeating()
    assert run(drafted, PROMPTS[:count], params, True) == run(plain, PROMPTS[:count], params, False)
    assert len(drafted.batches) <= len(plain.batches)


def test_a_text_that_repeats_takes_fewer_steps() -> None:
    plain, drafted = Repeating(), Repeating()
    params = SamplingParams(temperature=0, max_tokens=100)
    run(plain, PROMPTS[:1], params, False)
    run(drafted, PROMPTS[:1], params, True)
    assert len(drafted.batches) * 4 < len(plain.batches)


def test_a_step_with_drafts_is_bounded() -> None:
    decoder = Repeating()
    run(decoder, PROMPTS * 2, SamplingParams(temperature=0, max_tokens=60), True)
    drafted = [
        sum(tokens for tokens, _ in batch)
        for batch in decoder.batches
        if all(rows for _, rows in batch) and max(tokens for tokens, _ in batch) < 16
    ]
    assert 6 < max(drafted) <= 32  # 16, or a chunk of 16 beside


@pytest.mark.parametrize("crop_step", [1, 5])
def test_a_device_that_crops_coarsely_is_fed_again(crop_step: int) -> None:
    params = SamplingParams(temperature=1, seed=5, max_tokens=60)
    drafted = Repeating(crop_step=crop_step)
    assert run(drafted, PROMPTS, params, True) == run(Repeating(), PROMPTS, params, False)


def test_a_full_kv_cache_costs_drafts_first() -> None:
    params = SamplingParams(temperature=0, max_tokens=40)
    tight = Repeating(kv_tokens=60, max_context=60)
    assert run(tight, PROMPTS[:1], params, True) == run(Repeating(), PROMPTS[:1], params, False)


def test_an_answer_to_the_end_of_the_context() -> None:
    drafted = Repeating(max_context=64, kv_tokens=64)
    (answer,) = run(drafted, PROMPTS[:1], SamplingParams(temperature=0), True)
    assert len(answer[0].tokens) + len(PROMPTS[0]) == 64
    assert answer[0].finish_reason == "length"


@pytest.mark.parametrize("drafting", [False, True])
@pytest.mark.parametrize("kv_tokens", [1024, 128])
def test_batch_invariance_computes_no_token_alone(drafting: bool, kv_tokens: int) -> None:
    """Not even the last of a prompt that is a token longer than whole chunks."""
    decoder = Repeating(prefill_chunk=16, kv_tokens=kv_tokens)
    prompts = [[1, 2, 3, 4, 5, 6] * 2, [9] * 17, [7, 8] * 24 + [7]]
    params = SamplingParams(temperature=0, max_tokens=30)
    options = {"batch_invariant": True, "prompt_lookup": drafting}
    with Engine(decoder, LetterTokenizer(), vocab_size=decoder.vocab_size, **options) as engine:  # type: ignore[arg-type]
        generations = [engine.submit(prompt, params) for prompt in prompts]
        answers = [collect(generation)[0].tokens for generation in generations]
        decoder.check_integrity()
    assert min(tokens for batch in decoder.batches for tokens, _ in batch) >= 2
    plain = run(Repeating(), prompts, params, drafting=False)
    assert answers == [each[0].tokens for each in plain]
