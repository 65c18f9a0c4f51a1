"""Sampling against plain definitions."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_runtime.errors import EngineError, InvalidRequest
from edge_runtime.sampling import GROUP, SamplingParams, likeliest, make_sampler

VOCAB = 300
UNCUT: dict[str, Any] = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}


def random_logits(seed: int) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal(VOCAB) * 3).astype(np.float32)


def draws(params: SamplingParams, logits: NDArray[np.float32], count: int) -> Counter[int]:
    sampler = make_sampler(params, len(logits))
    return Counter(sampler(logits, [0], 1).token_id for _ in range(count))


def allowed(
    logits: NDArray[np.float32], temperature: float, top_k: int, top_p: float, min_p: float
) -> dict[int, float]:
    """token → probability, by the definitions, with full sorts."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if top_k:
        order = order[:top_k]
    weights = {token: math.exp((float(logits[token]) - float(logits[order[0]])) / temperature) for token in order}
    total, mass, nucleus = sum(weights.values()), 0.0, []
    for token in order:
        nucleus.append(token)
        mass += weights[token] / total
        if mass >= top_p:
            break
    kept = [token for token in nucleus if weights[token] >= min_p]
    total = sum(weights[token] for token in kept)
    return {token: weights[token] / total for token in kept}


@settings(max_examples=60)
@given(
    seed=st.integers(0, 1000),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 7, 100, 1000]),
    top_p=st.sampled_from([0.1, 0.5, 0.93, 1.0]),
    min_p=st.sampled_from([0.0, 0.1, 1.0]),
)
def test_only_allowed_tokens_are_drawn(seed: int, temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    logits = random_logits(seed)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    expected = allowed(logits, temperature, top_k, top_p, min_p)
    drawn = draws(params, logits, 60)
    assert set(drawn) <= set(expected)
    if len(expected) <= 2:
        assert all(token in drawn for token, p in expected.items() if p > 0.2)


@pytest.mark.parametrize("options", [{}, {"top_k": 8}, {"top_p": 0.8}, {"min_p": 0.2}, {"top_k": 20, "top_p": 0.9}])
def test_frequencies_are_the_probabilities(options: dict[str, Any]) -> None:
    logits = random_logits(1)
    expected = allowed(logits, 0.7, options.get("top_k", 0), options.get("top_p", 1.0), options.get("min_p", 0.0))
    count = 20_000
    drawn = draws(SamplingParams(temperature=0.7, seed=3, **(UNCUT | options)), logits, count)
    for token, p in expected.items():
        assert abs(drawn[token] / count - p) < 5 * math.sqrt(p * (1 - p) / count) + 2e-3


def test_zero_temperature_takes_the_likeliest_and_the_first_of_equals() -> None:
    logits = random_logits(2)
    logits[[40, 90]] = 50
    assert make_sampler(SamplingParams(temperature=0), VOCAB)(logits, [0], 1).token_id == 40


def adjusted(
    params: SamplingParams, logits: NDArray[np.float32], tokens: list[int], prompt: int
) -> NDArray[np.float64]:
    """Bias and penalties by their definitions."""
    values = logits.astype(np.float64)
    for token, bias in params.logit_bias.items():
        values[token] += bias
    for token in set(tokens):
        penalty = params.repetition_penalty or 1.0
        values[token] = values[token] / penalty if values[token] > 0 else values[token] * penalty
    for token, count in Counter(tokens[prompt:]).items():
        values[token] -= params.presence_penalty + params.frequency_penalty * count
    return values


@settings(max_examples=100)
@given(
    seed=st.integers(0, 1000),
    repetition=st.sampled_from([None, 0.8, 1.0, 1.5]),
    presence=st.sampled_from([0.0, 1.5, -2.0]),
    frequency=st.sampled_from([0.0, 0.7, -0.5]),
    bias=st.dictionaries(st.integers(0, 39), st.floats(-20, 20), max_size=4),
    prompt=st.lists(st.integers(0, 39), min_size=1, max_size=10),
)
def test_penalties_follow_their_definitions_as_the_output_grows(
    seed: int, repetition: float | None, presence: float, frequency: float, bias: dict[int, float], prompt: list[int]
) -> None:
    params = SamplingParams(
        temperature=0,
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        logit_bias=bias,
    )
    sampler = make_sampler(params, 40)
    tokens = list(prompt)
    for step in range(12):
        logits = random_logits(seed + step)[:40]
        before = logits.copy()
        expected = adjusted(params, logits, tokens, len(prompt))
        token = sampler(logits, tokens, len(prompt)).token_id
        assert expected[token] >= expected.max() - 1e-4
        assert np.array_equal(logits, before), "the logits were changed"
        tokens.append(token)


def test_a_seed_decides() -> None:
    def run(seed: int | None, index: int = 0) -> list[int]:
        sampler = make_sampler(SamplingParams(seed=seed), VOCAB, index)
        return [sampler(random_logits(step), [0], 1).token_id for step in range(20)]

    assert run(1) == run(1)
    assert run(-1) == run(-1)
    assert len({tuple(run(*a)) for a in ((1, 0), (1, 1), (2, 0), (None, 0), (None, 0), (-1, 0))}) == 6


def test_logprobs_are_of_the_raw_distribution() -> None:
    logits = random_logits(5)
    sampler = make_sampler(SamplingParams(temperature=0, logprobs=3, logit_bias={7: 100.0}), VOCAB)
    sampled = sampler(logits, [0], 1)
    exact = logits.astype(np.float64)
    log_p = exact - np.log(np.exp(exact).sum())
    assert sampled.token_id == 7
    assert sampled.logprob is not None
    assert sampled.logprob.logprob == pytest.approx(log_p[7], abs=1e-5)
    order = np.argsort(-log_p)[:3]
    assert [token for token, _ in sampled.logprob.top] == list(order)
    assert [value for _, value in sampled.logprob.top] == pytest.approx(list(log_p[order]), abs=1e-5)
    only = make_sampler(SamplingParams(temperature=0, logprobs=0), VOCAB)(logits, [0], 1)
    assert only.logprob is not None
    assert only.logprob.top == ()


@settings(max_examples=200)
@given(
    seed=st.integers(0, 1000),
    size=st.sampled_from([1, 40, GROUP * 8, GROUP * 8 + 1, GROUP * 50, GROUP * 50 + 17]),
    k=st.sampled_from([1, 2, 7, 8, 9, 40, 5000]),
    levels=st.sampled_from([1, 3, 100, 10**6]),
    cut=st.booleans(),
)
def test_the_likeliest_are_those_of_a_full_sort(seed: int, size: int, k: int, levels: int, cut: bool) -> None:
    """``levels``: few make many equal logits. ``cut``: most are -inf."""
    rng = np.random.default_rng(seed)
    logits = rng.integers(0, levels, size).astype(np.float32)
    if cut:
        logits[1:][rng.random(size - 1) < 0.9] = -np.inf
    before = logits.copy()
    ids, values = likeliest(logits, k)
    assert ids == sorted(range(size), key=lambda token: (-logits[token], token))[:k]
    assert values == logits[ids].tolist()
    assert np.array_equal(logits, before), "the logits were changed"


@pytest.mark.parametrize("size", [40, GROUP * 50, GROUP * 50 + 17])
@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {}, {"top_k": 0}, {"top_k": 0, "min_p": 0.0}, {"top_k": 0, "top_p": 1.0}, UNCUT]
)
def test_a_single_nan_is_refused(options: dict[str, Any], size: int, place: int) -> None:
    logits = np.zeros(size, np.float32)
    logits[place] = np.nan
    with pytest.raises(EngineError, match="largest logit is nan"):
        make_sampler(SamplingParams(**options), size)(logits, [0], 1)


@pytest.mark.parametrize("options", [{}, {"top_k": 0}, {"top_k": 0, "min_p": 0.0}, {"top_k": 0, "top_p": 1.0}, UNCUT])
@pytest.mark.parametrize("temperature", [1e-300, 1e300])
def test_extreme_temperatures(options: dict[str, Any], temperature: float) -> None:
    logits = random_logits(3)
    drawn = draws(SamplingParams(temperature=temperature, seed=1, **options), logits, 50)
    assert len(drawn) > 10 if temperature > 1 else set(drawn) == {int(logits.argmax())}


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("bad", [np.nan, -np.inf, np.inf])
def test_logits_without_a_number_to_choose_by(temperature: float, bad: float) -> None:
    logits = np.full(VOCAB, bad, np.float32)
    with pytest.raises(EngineError, match="largest logit"):
        make_sampler(SamplingParams(temperature=temperature), VOCAB)(logits, [0], 1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 10**400),
        ("temperature", math.nan),
        ("temperature", "1"),
        ("temperature", True),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("seed", 1.5),
        ("seed", 2**64),
        ("max_tokens", 0),
        ("n", 0),
        ("logprobs", 21),
        ("stop", ("",)),
        ("stop", "word"),
        ("stop_token_ids", (-1,)),
        ("logit_bias", {3: 101.0}),
        ("logit_bias", {-3: 1.0}),
        ("logit_bias", [1]),
        ("stop_token_ids", 5),
    ],
)
def test_bad_values_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(InvalidRequest, match=name) as caught:
        SamplingParams(**{name: value})  # type: ignore[arg-type]  # on purpose
    assert caught.value.param == name


@pytest.mark.parametrize("options", [{"logit_bias": {VOCAB: 1.0}}, {"stop_token_ids": (VOCAB,)}])
def test_tokens_outside_the_vocabulary_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=f"token {VOCAB} is outside"):
        make_sampler(SamplingParams(**options), VOCAB)


def test_defaults_come_from_request_then_model_then_globally() -> None:
    defaults = {"temperature": 0.6, "top_p": 0.95, "eos_token_id": 2, "top_k": None}
    params = SamplingParams(top_p=0.5).resolved(defaults)
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (0.6, 40, 0.5, 0.05)
    assert SamplingParams().resolved().temperature == 0.8
    assert SamplingParams().resolved({"do_sample": False, "temperature": 0.6}).temperature == 0
    assert SamplingParams(temperature=1.0).resolved({"do_sample": False}).temperature == 1.0
    assert SamplingParams().resolved(defaults).max_tokens is None
