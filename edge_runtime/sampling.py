"""From logits to a token: the request's options, and a sampler built from them once.

Order, as in Transformers' logits processors: logit bias → repetition, presence and frequency penalties →
temperature → top-k → top-p → min-p → draw.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import EngineError, InvalidRequest

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability under the model's own distribution (before bias, penalties and temperature)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """(token id, logprob) of the most likely alternatives, best first."""


class Sampled(NamedTuple):
    token_id: int
    logprob: TokenLogprob | None


Sampler = Callable[[Logits, Sequence[int], int], Sampled]
"""``sampler(logits, tokens, prompt_length)``: logits (vocab,) float32 are not changed; ``tokens`` is prompt and
output so far. A sampler belongs to one completion: its penalties count ``tokens`` as they grow."""


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


def make_sampler(params: SamplingParams, vocab_size: int, index: int = 0) -> Sampler:
    """Build the sampler of completion ``index``; options that are off cost nothing per token.

    InvalidRequest if ``logit_bias`` or ``stop_token_ids`` names a token outside the vocabulary. The sampler
    raises EngineError when the logits hold no number to choose by.
    """
    params = params.resolved()
    for name, tokens in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
        outside = [token for token in tokens if token >= vocab_size]
        if outside:
            raise InvalidRequest(f"{name}: token {outside[0]} is outside the vocabulary of {vocab_size} tokens", name)
    adjust = _adjuster(params, vocab_size)
    choose = _chooser(params, index)
    describe = _describer(params.logprobs)

    def sample(logits: Logits, tokens: Sequence[int], prompt_length: int) -> Sampled:
        token = choose(adjust(logits, tokens, prompt_length))
        return Sampled(token, describe(logits, token))

    return sample


# --- bias and penalties -----------------------------------------------------------------------------------------------

Adjust = Callable[[Logits, Sequence[int], int], Logits]


def _adjuster(params: SamplingParams, vocab_size: int) -> Adjust:
    steps: list[Adjust] = []
    if params.logit_bias:
        steps.append(_bias(params.logit_bias))
    if params.repetition_penalty != 1.0:
        assert params.repetition_penalty is not None  # resolved
        steps.append(_repetition(params.repetition_penalty, vocab_size))
    if params.presence_penalty or params.frequency_penalty:
        steps.append(_presence_frequency(params.presence_penalty, params.frequency_penalty, vocab_size))
    if not steps:
        return lambda logits, tokens, prompt_length: logits

    def adjust(logits: Logits, tokens: Sequence[int], prompt_length: int) -> Logits:
        logits = logits.copy()
        for step in steps:
            logits = step(logits, tokens, prompt_length)
        return logits

    return adjust


def _bias(biases: Mapping[int, float]) -> Adjust:
    ids = np.fromiter(biases, np.int64)
    values = np.fromiter(biases.values(), np.float32)

    def adjust(logits: Logits, tokens: Sequence[int], prompt_length: int) -> Logits:
        logits[ids] += values
        return logits

    return adjust


def _repetition(penalty: float, vocab_size: int) -> Adjust:
    seen = np.zeros(vocab_size, np.bool_)
    counted = 0

    def adjust(logits: Logits, tokens: Sequence[int], prompt_length: int) -> Logits:
        nonlocal counted
        seen[np.asarray(tokens[counted:], np.int64)] = True
        counted = len(tokens)
        ids = np.flatnonzero(seen)
        values = logits[ids]
        logits[ids] = np.where(values > 0, values / np.float32(penalty), values * np.float32(penalty))
        return logits

    return adjust


def _presence_frequency(presence: float, frequency: float, vocab_size: int) -> Adjust:
    counts = np.zeros(vocab_size, np.int32)
    counted = 0

    def adjust(logits: Logits, tokens: Sequence[int], prompt_length: int) -> Logits:
        nonlocal counted
        start = max(counted, prompt_length)
        np.add.at(counts, np.asarray(tokens[start:], np.int64), 1)
        counted = len(tokens)
        ids = np.flatnonzero(counts)
        logits[ids] -= np.float32(presence) + np.float32(frequency) * counts[ids].astype(np.float32)
        return logits

    return adjust


# --- choice -----------------------------------------------------------------------------------------------------------

Choose = Callable[[Logits], int]
Candidates = Callable[[Logits], tuple[NDArray[np.int64], Logits]]
"""Scaled logits (vocab,), largest 0 → the ids that may be drawn and their scaled logits."""


def _chooser(params: SamplingParams, index: int) -> Choose:
    assert params.temperature is not None  # resolved
    return _greedy if params.temperature == 0 else _drawn(params, params.temperature, index)


def _greedy(logits: Logits) -> int:
    token = int(np.argmax(logits))  # of NaN, argmax returns the first
    _require_number(float(logits[token]))
    return token


def _drawn(params: SamplingParams, temperature: float, index: int) -> Choose:
    assert params.top_k is not None  # resolved
    assert params.top_p is not None
    assert params.min_p is not None
    entropy = None if params.seed is None else [params.seed % 2**64, index]
    generator = np.random.default_rng(np.random.SeedSequence(entropy))
    candidates = _everything if params.top_k == 0 else _top_k(params.top_k)
    if params.top_p < 1:
        candidates = _top_p(candidates, params.top_p)
    if params.min_p > 0:
        candidates = _min_p(candidates, math.log(params.min_p))

    def choose(logits: Logits) -> int:
        largest = float(np.max(logits))
        _require_number(largest)
        ids, scaled = candidates((logits - np.float32(largest)) / np.float32(temperature))
        mass = np.cumsum(np.exp(scaled), dtype=np.float64)
        drawn = int(np.searchsorted(mass, generator.random() * mass[-1], side="right"))
        return int(ids[min(drawn, len(ids) - 1)])

    return choose


def _require_number(largest: float) -> None:
    if not math.isfinite(largest):
        raise EngineError(
            f"the model's largest logit is {largest}: its weights or this device's arithmetic are broken; "
            "try another device or a wider weight format"
        )


def _everything(scaled: Logits) -> tuple[NDArray[np.int64], Logits]:
    return np.arange(len(scaled)), scaled


def _top_k(k: int) -> Candidates:
    def candidates(scaled: Logits) -> tuple[NDArray[np.int64], Logits]:
        if k >= len(scaled):
            return _everything(scaled)
        ids = np.sort(np.argpartition(scaled, -k)[-k:])  # by id, so that a draw does not hang on the partition's order
        return ids, scaled[ids]

    return candidates


def _top_p(inner: Candidates, p: float) -> Candidates:
    """Nucleus by growing partial selections: text models rarely need more than the first."""

    def candidates(scaled: Logits) -> tuple[NDArray[np.int64], Logits]:
        ids, values = inner(scaled)
        target = p * float(np.sum(np.exp(values), dtype=np.float64))
        size = 64
        while True:
            top = np.argpartition(values, -size)[-size:] if size < len(values) else np.arange(len(values))
            top = top[np.lexsort((top, -values[top]))]  # likeliest first, ties by id
            mass = np.cumsum(np.exp(values[top]), dtype=np.float64)
            if mass[-1] >= target or size >= len(values):
                break
            size *= 8
        top = top[: int(np.searchsorted(mass, target)) + 1]
        return ids[top], values[top]

    return candidates


def _min_p(inner: Candidates, log_p: float) -> Candidates:
    def candidates(scaled: Logits) -> tuple[NDArray[np.int64], Logits]:
        ids, values = inner(scaled)
        keep = values >= log_p  # the largest is 0
        return ids[keep], values[keep]

    return candidates


# --- logprobs ---------------------------------------------------------------------------------------------------------


def _describer(alternatives: int | None) -> Callable[[Logits, int], TokenLogprob | None]:
    if alternatives is None:
        return lambda logits, token: None
    count = alternatives

    def describe(logits: Logits, token: int) -> TokenLogprob:
        normalizer = log_sum_exp(logits)
        top: list[int] = []
        if count:
            ids = np.argpartition(logits, -min(count, len(logits)))[-count:]
            top = [int(i) for i in ids[np.lexsort((ids, -logits[ids]))]]
        pairs = tuple((i, float(logits[i]) - normalizer) for i in top)
        return TokenLogprob(token, float(logits[token]) - normalizer, pairs)

    return describe


def log_sum_exp(logits: Logits) -> float:
    """log Σ exp over the last (only) axis."""
    largest = float(np.max(logits))
    return largest + math.log(float(np.sum(np.exp(logits - np.float32(largest)), dtype=np.float64)))


# --- checks -----------------------------------------------------------------------------------------------------------


def _number(name: str, value: object, low: float, high: float, above: bool = False) -> None:
    if value is None:
        return
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not isinstance(value, (int, float)) or not (low < value if above else low <= value) or value > high:
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
