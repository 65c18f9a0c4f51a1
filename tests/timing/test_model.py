"""The timing model, on machines of which every time is known."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from edge_runtime.errors import NotMeasured
from edge_runtime.timing.least_squares import left_out, nonnegative, robust_nonnegative
from edge_runtime.timing.model import Beside, Estimate, TimingModel, short
from edge_runtime.timing.observations import EachToken, FirstToken
from edge_runtime.timing.ttft import predict_ttft
from tests.timing.known import CHUNK, PAIRS, each, first, observed, seconds

UNSEEN = [*(first(prompt) for prompt in (50, 257, 333, 999, 1800)), first(1500, 1100), first(300, beside=5, held=2500)]
UNSEEN_LATER = [each(1, 500), each(1, 1700), each(3, 600), each(12, 80)]


def width(estimate: Estimate) -> float:
    assert estimate.low < estimate.seconds < estimate.high
    return estimate.high / estimate.seconds - 1


def told(model: TimingModel, one: FirstToken | EachToken) -> Estimate:
    if isinstance(one, EachToken):
        return model.tpot(one.held // one.batch, one.batch)
    return model.ttft(one.prompt, one.cached, Beside(one.beside, one.held))


def test_without_noise_every_unseen_time_is_found() -> None:
    model = TimingModel(observed(), CHUNK)
    for one in [*UNSEEN, *UNSEEN_LATER]:
        assert told(model, one).seconds == pytest.approx(one.seconds, rel=1e-3), one


def test_a_whole_answer_is_the_sum_of_its_tokens() -> None:
    model = TimingModel(observed(), CHUNK)
    by_hand = first(700).seconds + sum(each(1, 700 + token).seconds for token in range(1, 100))
    assert model.total(700, 100).seconds == pytest.approx(by_hand, rel=1e-3)
    assert model.total(700, 1).seconds == pytest.approx(model.ttft(700).seconds)
    assert model.total(700, 100, batch=4).seconds > model.total(700, 100).seconds
    assert model.total(700, 100, cached=600).seconds < model.total(700, 100).seconds


@pytest.mark.parametrize("noise", [0.04, 0.08, 0.16])
def test_with_noise_it_stays_within_it_and_the_bars_hold(noise: float) -> None:
    """Nine in ten, on average over machines that were measured once, and asked when they were some other per cent
    faster or slower in all."""
    errors, within = [], []
    for seed in range(60):
        model = TimingModel(observed(noise, seed), CHUNK)
        rng = np.random.default_rng((seed, 1))
        drift = 0.08 * rng.normal()
        for one in [*UNSEEN, *UNSEEN_LATER]:
            estimate = told(model, one)
            errors.append(abs(estimate.seconds / one.seconds - 1))
            within.append(estimate.low <= one.seconds * np.exp(drift + noise * rng.normal()) <= estimate.high)
    assert np.median(errors) < noise / 2
    assert 0.85 < np.mean(within) < 0.97


def test_a_time_that_is_far_off_counts_little() -> None:
    observations = observed(0.02)
    observations[4] = msgspec.structs.replace(observations[4], seconds=5 * observations[4].seconds)
    model = TimingModel(observations, CHUNK)
    for one in UNSEEN:
        assert told(model, one).seconds == pytest.approx(one.seconds, rel=0.1)


def test_what_varied_between_rounds_widens_the_bars() -> None:
    calm = observed(0.01)
    noisy = [msgspec.structs.replace(one, slowest=1.5 * one.seconds) for one in calm]
    wide, narrow = (TimingModel(each, CHUNK).ttft(500) for each in (noisy, calm))
    assert width(wide) > 3 * width(narrow)
    assert wide.seconds / wide.low == pytest.approx(narrow.seconds / narrow.low, rel=0.1)  # it is never faster
    quick = [msgspec.structs.replace(one, fastest=one.seconds / 1.5) for one in calm]
    told = TimingModel(quick, CHUNK).ttft(500)
    assert told.seconds / told.low > 1.3 > told.high / told.seconds


def test_far_from_what_was_measured_the_bars_are_wider() -> None:
    model = TimingModel(observed(0.05), CHUNK)
    bars = [width(model.ttft(prompt)) for prompt in (1000, 4000, 16000)]
    assert bars[1] > 1.8 * bars[0]
    assert bars[2] > 3.5 * bars[1]
    assert width(model.tpot(8000)) > 3 * width(model.tpot(1000))
    assert width(model.tpot(100, 64)) > 3 * width(model.tpot(100, 8))


def test_what_was_never_varied_is_said_to_be_unknown() -> None:
    """Without batches nobody can tell what the step and what the sequence in it takes."""
    alone = [one for one in observed(0.03) if not (isinstance(one, EachToken) and one.batch > 1)]
    alone = [one for one in alone if not (isinstance(one, FirstToken) and one.beside)]
    model = TimingModel(alone, CHUNK)
    assert width(model.tpot(500, 8)) > 5 * width(model.tpot(500))


def test_the_work_before_and_beside_counts() -> None:
    model = TimingModel(observed(), CHUNK)
    ahead = model.ttft(300, beside=Beside(prompts=(500, 700)))
    request = seconds(FirstToken(prompt=1, seconds=0))
    assert ahead.seconds > model.ttft(300).seconds + model.ttft(500).seconds + model.ttft(700).seconds - 3 * request
    assert model.ttft(300, beside=Beside(8, 4000)).seconds > model.ttft(300).seconds
    with pytest.raises(ValueError, match="cannot have 300 that are known"):
        model.ttft(300, 300)


@pytest.mark.parametrize(
    ("observations", "message"),
    [
        ([], "first tokens of 0 lengths of prompts and 0 times per token"),
        ([first(100), each(1, 100)] * 10, "first tokens of 1 lengths of prompts and 1 times per token"),
        ([first(prompt) for prompt in range(100, 900, 50)], "and 0 times per token"),
        ([first(10), first(20), first(30), each(1, 10), each(1, 20)], "with some of them twice"),
    ],
)
def test_too_little_is_refused(observations: list[FirstToken | EachToken], message: str) -> None:
    with pytest.raises(NotMeasured, match=message) as refused:
        TimingModel(observations, CHUNK)
    assert "edge-glm bench REF" in str(refused.value)


def test_a_guess_of_known_tokens_is_cut() -> None:
    model = TimingModel(observed(), CHUNK)
    assert predict_ttft(model, 100, 100, Beside()).cached == 99
    told = predict_ttft(model, 600, 512, Beside(3, 900, (200, 50)))
    assert told.ms == pytest.approx(1e3 * model.ttft(600, 512, Beside(3, 900, (200, 50))).seconds)
    assert str(told).endswith(" for 600 tokens, 512 of them known, after 250 tokens of others, beside 3 answers")


def test_attention_is_told_apart_from_the_rest() -> None:
    """Twice the prompt takes more than twice the time, by exactly its pairs."""
    model = TimingModel(observed(), CHUNK)
    more = model.ttft(2000).seconds - 2 * model.ttft(1000).seconds
    pairs = PAIRS * (2000 * 2001 / 2 - 2 * 1000 * 1001 / 2)
    assert more == pytest.approx(pairs, rel=0.1)


@pytest.mark.parametrize(
    ("given", "words"),
    [(0.0024, "2.4 ms"), (0.48, "480 ms"), (1.239, "1.24 s"), (12.44, "12.4 s"), (140.2, "140 s"), (0.9996, "1.00 s")],
)
def test_seconds_in_words(given: float, words: str) -> None:
    assert short(given) == words


# --- least squares ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_nonnegative_least_squares_is_optimal(seed: int) -> None:
    """By the conditions of Karush, Kuhn and Tucker."""
    rng = np.random.default_rng(seed)
    matrix, values = rng.normal(size=(30, 7)), rng.normal(size=30)
    found = nonnegative(matrix, values)
    slope = matrix.T @ (values - matrix @ found)
    assert (found >= 0).all()
    assert (slope <= 1e-9).all()
    assert np.abs(slope[found > 0]).max(initial=0.0) < 1e-9


def test_nonnegative_least_squares_of_columns_that_are_the_same() -> None:
    matrix = np.ones((5, 3))
    found = nonnegative(matrix, np.full(5, 2.0))
    assert (found >= 0).all()
    assert matrix @ found == pytest.approx(np.full(5, 2.0))
    assert (nonnegative(matrix, np.full(5, -2.0)) == 0).all()


def test_robust_weights_are_small_where_the_error_is_large() -> None:
    rng = np.random.default_rng(0)
    matrix = rng.uniform(size=(40, 2))
    values = matrix @ np.array([1.0, 2.0]) + 0.01 * rng.normal(size=40)
    values[3] += 5
    found, weights = robust_nonnegative(matrix, values)
    assert found == pytest.approx([1, 2], abs=0.05)
    assert weights[3] < 0.05 < 0.5 < np.median(weights)


def test_what_is_left_out_does_not_predict_itself() -> None:
    """On a line through three points, far from a fourth, which counts for nothing or as much."""
    matrix, values = np.array([[1.0], [2.0], [3.0], [4.0]]), np.array([2.0, 4.0, 6.0, 80.0])
    found = left_out(matrix, values, np.array([1.0, 1.0, 1.0, 0.0]))
    assert found == pytest.approx([2, 4, 6, 8])
    assert left_out(matrix, values, np.ones(4))[0] > 5
