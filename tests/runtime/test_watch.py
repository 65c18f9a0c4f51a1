"""What a watch sees of prompt and answer is what the model says of them."""

from __future__ import annotations

import numpy as np
import pytest

from edge_runtime.sampling import SamplingParams, log_sum_exp
from edge_runtime.watch import Watch
from tests.fake_decoder import FakeDecoder
from tests.runtime.helpers import GREEDY, ask, collect, greedy, prompt, serving


def watched(decoder: FakeDecoder, ids: list[int], watch: Watch, params: SamplingParams = GREEDY) -> list[int]:
    with serving(decoder) as engine, engine.submit(ids, params, (), watch) as generation:
        return collect(generation, params.n)[0].tokens


def test_surprise_is_what_scoring_says() -> None:
    ids = prompt(1, 20)
    watch = Watch(prompt_tokens=8)
    with serving(FakeDecoder(prefill_chunk=32)) as engine:
        with engine.submit(ids, GREEDY, (), watch) as generation:
            collect(generation)
        scores = engine.score(ids)
    assert watch.surprise == pytest.approx([-score for score in scores[-8:]], abs=1e-5)


def test_confidence_is_that_of_the_logits() -> None:
    ids = prompt(2, 9)
    watch = Watch(tokens=5)
    decoder = FakeDecoder()
    tokens = watched(decoder, ids, watch)
    assert len(watch.answer) == 5
    for place, seen in enumerate(watch.answer):
        with serving(FakeDecoder()) as engine:
            logits = engine.logits([*ids, *tokens[:place]])
        second, first = np.sort(logits)[-2:]
        assert seen.logprob == pytest.approx(float(logits[tokens[place]] - log_sum_exp(logits)), abs=1e-5)
        assert seen.margin == pytest.approx(float(first - second), abs=1e-5)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("length", [1, 2, 7, 40])
def test_a_watched_answer_is_the_same(length: int, n: int) -> None:
    ids, watch = prompt(length, length), Watch()
    params = SamplingParams(temperature=0, max_tokens=12, n=n)
    with serving(FakeDecoder(prefill_chunk=16)) as engine, engine.submit(ids, params, (), watch) as generation:
        for answer in collect(generation, n):
            assert answer.tokens == greedy(FakeDecoder(), ids, 12)
    assert len(watch.answer) == 12
    assert min(length - 1, 1) <= len(watch.surprise) <= min(length - 1, 15)


def test_of_a_known_prompt_only_what_is_computed_is_seen() -> None:
    ids = prompt(3, 30)
    with serving(FakeDecoder()) as engine:
        ask(engine, ids, GREEDY)
        watch = Watch()
        with engine.submit([*ids, 5, 6], GREEDY, (), watch) as generation:
            collect(generation)
    assert 1 <= len(watch.surprise) < 31
    assert len(watch.answer) == 12


def test_another_engine_begins_anew() -> None:
    watch = Watch()
    watched(FakeDecoder(), prompt(4, 6), watch)
    watched(FakeDecoder(), prompt(4, 6), watch)
    assert len(watch.answer) == 12
