"""From logits to a token: the request's options, and a sampler built from them once.

Order, as in Transformers' logits processors: logit bias → repetition, presence and frequency penalties → grammar →
temperature → top-k → top-p → min-p → draw.
"""

from __future__ import annotations

import math
import random
import sys
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from operator import neg
from types import MappingProxyType
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_runtime.constraints import Constraint
from edge_runtime.errors import EngineError, InvalidRequest
from edge_runtime.grammar import Grammar
from edge_runtime.penalties import Logits, make_adjuster

GROUP = 64
"""Logits of which :func:`likeliest` takes the maximum at once."""


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability under the model's own distribution (before bias, penalties and temperature)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """(token id, logprob) of the most likely alternatives, best first."""


class Sampled(msgspec.Struct, frozen=True):
    token_id: int
    logprob: TokenLogprob | None


Sampler = Callable[[Logits, Sequence[int], int], Sampled]
"""``sampler(logits, tokens, prompt_length)``: logits (vocab,) float32 are as before when it returns, but must be
writable; ``tokens`` is prompt and output so far. A sampler belongs to one completion: its penalties count ``tokens`` as
they grow."""


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop. ``None``: the model's generation default, then the global one.

    The global ones are llama.cpp's. Drawing from the whole distribution (temperature 1, nothing cut), as a hosted
    API does, leaves a small model's answer as soon as one unlikely token is drawn.

    Raises InvalidRequest, with ``param`` set, for a value out of range.
    """

    temperature: float | None = None
    """≥ 0; 0 takes the likeliest token. Global default 0.8."""
    top_k: int | None = None
    """Only the k likeliest tokens; 0: all. Global default 40."""
    top_p: float | None = None
    """Only the smallest set of likeliest tokens with at least this mass (arXiv 1904.09751), 0 < p ≤ 1. Global
    default 0.95."""
    min_p: float | None = None
    """Only tokens at least this fraction as likely as the likeliest (arXiv 2407.01082), 0 ≤ p ≤ 1. Global default
    0.05."""
    repetition_penalty: float | None = None
    """> 0. Logits of tokens in prompt or output are divided by it if positive, multiplied if negative
    (arXiv 1909.05858, as in Transformers, vLLM and llama.cpp). Global default 1."""
    presence_penalty: float = 0.0
    """-2 … 2, subtracted once from tokens in the output (OpenAI's definition)."""
    frequency_penalty: float = 0.0
    """-2 … 2, subtracted for each time the token is in the output (OpenAI's definition)."""
    seed: int | None = None
    """Same seed, same prompt, same tokens, whatever else is in the batch."""
    max_tokens: int | None = None
    """None: up to the end of the context."""
    stop: tuple[str, ...] = ()
    """The text ends before the first of these."""
    stop_token_ids: tuple[int, ...] = ()
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Token id → number from -100 to 100 added to its logit."""
    ignore_eos: bool = False
    n: int = 1
    """Completions of the same prompt."""
    logprobs: int | None = None
    """Number of alternatives to report with each token, 0 … 20; 0: only the chosen one; None: no logprobs."""
    grammar: Grammar | None = None
    """The form that the answer must have."""

    def __post_init__(self) -> None:
        _number("temperature", self.temperature, 0.0, math.inf)
        _integer("top_k", self.top_k, 0)
        _number("top_p", self.top_p, 0.0, 1.0, above=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, math.inf, above=True)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _integer("seed", self.seed, -(2**63), 2**64 - 1)
        _integer("max_tokens", self.max_tokens, 1)
        _integer("n", self.n, 1, 128)
        _integer("logprobs", self.logprobs, 0, 20)
        _sequence("stop", self.stop)
        object.__setattr__(self, "stop", tuple(self.stop))  # lists are taken too, but must not change afterwards
        if not all(isinstance(text, str) and text for text in self.stop):
            raise InvalidRequest(f"stop must be non-empty strings, not {self.stop!r}", "stop")
        _sequence("stop_token_ids", self.stop_token_ids)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, 0)
        if not isinstance(self.logit_bias, Mapping):
            raise InvalidRequest(f"logit_bias must map token ids to numbers, not {self.logit_bias!r}", "logit_bias")
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        for token, bias in self.logit_bias.items():
            _integer("logit_bias", token, 0)
            _number("logit_bias", bias, -100.0, 100.0)
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise InvalidRequest(f"grammar must be a Grammar, not {self.grammar!r}", "grammar")

    def resolved(self, defaults: Mapping[str, Any] | None = None) -> SamplingParams:
        """Fill every ``None`` that has a default: first from ``defaults`` (generation_config.json), then globally.

        ``do_sample: false`` in ``defaults`` means temperature 0. ``seed``, ``max_tokens`` and ``logprobs`` stay None.
        """
        given = dict(defaults or {})
        if given.get("do_sample") is False:
            given["temperature"] = 0.0
        filled = {
            name: given[name] if given.get(name) is not None else fallback
            for name, fallback in _GLOBAL_DEFAULTS.items()
            if getattr(self, name) is None
        }
        return replace(self, **filled)


_GLOBAL_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.0}
)


def make_sampler(
    params: SamplingParams, vocab_size: int, index: int = 0, constraint: Constraint | None = None
) -> Sampler:
    """Build the sampler of completion ``index``; options that are off cost nothing per token. ``constraint`` holds it
    to the grammar, if there is one.

    InvalidRequest if ``logit_bias`` or ``stop_token_ids`` names a token outside the vocabulary. The sampler
    raises EngineError when the logits hold no number to choose by.
    """
    params = params.resolved()
    for name, tokens in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
        outside = [token for token in tokens if token >= vocab_size]
        if outside:
            raise InvalidRequest(f"{name}: token {outside[0]} is outside the vocabulary of {vocab_size} tokens", name)
    adjust = make_adjuster(params, vocab_size)
    choose_any = _chooser(params, index)
    describe = _describer(params.logprobs)

    def choose(logits: Logits, tokens: Sequence[int], prompt_length: int) -> int:
        return choose_any(logits if constraint is None else constraint.only(logits, tokens, prompt_length))

    def sample(logits: Logits, tokens: Sequence[int], prompt_length: int) -> Sampled:
        if adjust is None:
            token = choose(logits, tokens, prompt_length)
        else:
            try:
                adjust.apply(logits, tokens, prompt_length)
                token = choose(logits, tokens, prompt_length)
            finally:
                adjust.restore(logits)
        return Sampled(token, None if describe is None else describe(logits, token))

    return sample


# --- choice -----------------------------------------------------------------------------------------------------------

Choose = Callable[[Logits], int]
Ranked = tuple[list[int], list[float]]
"""Token ids and a number for each, largest first, equal ones by id."""
Candidates = Callable[[Logits], tuple[Ranked, float | None]]
"""Logits (vocab,) → what top-k leaves, by their weights: exp((logit - largest) / temperature). Tokens that top-p or
min-p will cut off anyway may be missing; then the sum of all weights comes with them."""


def _chooser(params: SamplingParams, index: int) -> Choose:
    assert params.temperature is not None  # resolved
    assert params.top_k is not None
    assert params.top_p is not None
    assert params.min_p is not None
    if params.temperature == 0:
        return _greedy
    temperature = min(max(params.temperature, 1e-30), 1e30)  # what float32 can hold
    draw = random.Random(None if params.seed is None else f"{params.seed % 2**64} {index}").random
    if params.top_k > 0:
        candidates = _top_k(params.top_k, temperature)
    elif params.min_p > 0:
        candidates = _above(params.min_p, temperature, summed=params.top_p < 1)
    elif params.top_p < 1:
        candidates = _nucleus(params.top_p, temperature)
    else:
        return _uncut(temperature, draw)
    return _cut(candidates, params.top_p, params.min_p, draw)


def _greedy(logits: Logits) -> int:
    token = int(logits.argmax())  # of NaN, argmax returns the first
    check_largest(logits.item(token))
    return token


def check_largest(logit: float) -> None:
    """EngineError unless it is a number that a token can be chosen by. (Of logits of which any is NaN, it is NaN.)"""
    if not math.isfinite(logit):
        raise EngineError(
            f"the model's largest logit is {logit}: its weights or this device's arithmetic are broken; "
            "try another device or a wider weight format"
        )


def _largest(logits: Logits) -> float:
    largest: float = logits.item(_greedy(logits))
    return largest


def _uncut(temperature: float, draw: Callable[[], float]) -> Choose:
    def choose(logits: Logits) -> int:
        mass = _weights(logits, _largest(logits), temperature).cumsum(dtype=np.float64)
        last = int(mass.searchsorted(mass[-1]))  # of those that have any
        return min(int(mass.searchsorted(draw() * mass[-1], side="right")), last)

    return choose


def _cut(candidates: Candidates, top_p: float, min_p: float, draw: Callable[[], float]) -> Choose:
    """Lists, since for some tens of tokens numpy's calls would take longer than what they compute."""

    def choose(logits: Logits) -> int:
        (ids, weights), total = candidates(logits)
        mass = list(accumulate(weights))
        count = len(ids)
        if top_p < 1:
            count = min(count, bisect_left(mass, top_p * (mass[-1] if total is None else total)) + 1)
        if min_p > 0:
            count = min(count, bisect_right(weights, -min_p, key=neg))
        elif not weights[count - 1]:  # ruled out, or hopeless
            count = bisect_left(weights, 0.0, key=neg)
        return ids[min(bisect_right(mass, draw() * mass[count - 1], 0, count), count - 1)]

    return choose


def _top_k(k: int, temperature: float) -> Candidates:
    def candidates(logits: Logits) -> tuple[Ranked, float | None]:
        return _weighed(likeliest(logits, k), temperature), None

    return candidates


def _above(min_p: float, temperature: float, summed: bool) -> Candidates:
    """The tokens that min-p leaves. Not ``summed``: nobody will ask for the sum."""
    reach = temperature * math.log(min_p)

    def candidates(logits: Logits) -> tuple[Ranked, float | None]:
        largest = _largest(logits)
        total = _total(logits, largest, temperature) if summed else None
        return _weighed(_from(logits, np.float32(largest + reach)), temperature), total

    return candidates


def _nucleus(top_p: float, temperature: float) -> Candidates:
    """By growing selections: text models rarely need more than the first."""

    def candidates(logits: Logits) -> tuple[Ranked, float | None]:
        total = _total(logits, _largest(logits), temperature)
        size = 64
        while True:
            ids, weights = _weighed(likeliest(logits, size), temperature)
            if sum(weights) >= top_p * total or size >= len(logits):
                return (ids, weights), total
            size *= 8

    return candidates


def _weights(logits: Logits, largest: float, temperature: float) -> NDArray[np.float32]:
    weights: NDArray[np.float32] = np.exp((logits - np.float32(largest)) / np.float32(temperature))
    return weights


def _total(logits: Logits, largest: float, temperature: float) -> float:
    return float(_weights(logits, largest, temperature).sum(dtype=np.float64))


def _weighed(ranked: Ranked, temperature: float) -> Ranked:
    ids, values = ranked
    largest = values[0]
    return ids, [math.exp((value - largest) / temperature) for value in values]


def likeliest(logits: Logits, k: int) -> Ranked:
    """The ``k`` largest logits, as sorting all would give them, in a twentieth of the time or less.

    They are as large as the k-th largest maximum of any groups of logits, which few others are. EngineError if the
    logits hold no number to choose by.
    """
    k = min(k, len(logits))
    groups = len(logits) // GROUP
    if k > groups:
        maxima = logits.copy()
    else:
        maxima = np.maximum.reduce(logits[: groups * GROUP].reshape(GROUP, groups))
        if len(logits) % GROUP:
            maxima = np.append(maxima, logits[groups * GROUP :])
    _greedy(maxima)  # raises if there is a NaN
    maxima.partition(len(maxima) - k)
    ids, values = _from(logits, maxima[-k])
    return ids[:k], values[:k]


def _from(logits: Logits, bound: np.float32) -> Ranked:
    """All logits from ``bound`` up."""
    ids = (logits >= bound).nonzero()[0]
    values = logits[ids]
    order = (-values).argsort(kind="stable")
    return ids[order].tolist(), values[order].tolist()


# --- logprobs ---------------------------------------------------------------------------------------------------------


def _describer(alternatives: int | None) -> Callable[[Logits, int], TokenLogprob] | None:
    """None: nobody asks."""
    if alternatives is None:
        return None
    count = alternatives

    def describe(logits: Logits, token: int) -> TokenLogprob:
        normalizer = log_sum_exp(logits)
        top = zip(*likeliest(logits, count), strict=True) if count else ()
        pairs = tuple((other, value - normalizer) for other, value in top)
        return TokenLogprob(token, logits.item(token) - normalizer, pairs)

    return describe


def log_sum_exp(logits: Logits) -> float:
    """log Σ exp over the last (only) axis. EngineError if there is nothing to sum."""
    largest = float(logits.max())
    check_largest(largest)
    return largest + math.log(_total(logits, largest, 1.0))


# --- checks -----------------------------------------------------------------------------------------------------------


def _number(name: str, value: object, low: float, high: float, above: bool = False) -> None:
    if value is None:
        return
    good = (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and abs(value) <= sys.float_info.max  # not by math.isfinite, for which an integer may be too large
        and (low < value if above else low <= value)
        and value <= high
    )
    if not good:
        limits = f"{'above' if above else 'at least'} {low:g}" + ("" if high == math.inf else f" and at most {high:g}")
        raise InvalidRequest(f"{name} must be a number {limits}, not {value!r}", name)


def _integer(name: str, value: object, low: int, high: int | None = None) -> None:
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        limits = f"at least {low}" + ("" if high is None else f" and at most {high}")
        raise InvalidRequest(f"{name} must be an integer {limits}, not {value!r}", name)


def _sequence(name: str, value: object) -> None:
    if not isinstance(value, (tuple, list)):
        raise InvalidRequest(f"{name} must be a list, not {value!r}", name)
