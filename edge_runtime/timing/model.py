"""The time of a request, from the times of the steps that it takes.

A step of the engine reads the weights once, multiplies them by every token in it, and lets each token attend to what is
before it. So its time is taken as a sum, whose parts are found by least squares of the relative error, none negative:

- for every step; and more, if it has several tokens, which engines multiply by other kernels than a lone one;
- for each sequence that decodes in it, and for each token of KV cache that they hold; and once more, if tokens of a
  prompt are in it beside them;
- for each token of a prompt, the first :data:`FEW` of a step apart, which do not fill the kernels' tiles yet;
- for each pair of a prompt's token and one before it (attention);
- and of a request, once: for taking it in, and for each token of a known prefix, which some devices copy.

A prompt comes in the middle of a step of those that decode, waits for its end, and is run in the scheduler's chunks,
beside what decodes meanwhile; time per token is that of a step with decoding
sequences alone. The form is that of roofline models of transformers (Yuan et al., LLM Inference Unveiled, 2024, arXiv
2402.16363) with measured constants. The error bars come from how far each measurement is
from what all the others predict of it (the jackknife; Barber et al., Predictive inference with the jackknife+, 2021,
arXiv 1905.02928): the median, the fastest and the slowest time of several rounds, apart for longer and for shorter;
and from how far a request is from what was measured (Draper and Smith, Applied Regression Analysis, 3rd ed., 1998,
section 1.4).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edge_runtime.chunks import chunks
from edge_runtime.errors import NotMeasured
from edge_runtime.timing.least_squares import Vector, left_out, robust_nonnegative
from edge_runtime.timing.observations import EachToken, FirstToken, Observation

FEW = 64
"""Tokens of a prompt's step that are counted apart."""
PROMPTS, HELD = 3, 2
"""Different lengths of prompts, and different KV caches while decoding, that must have been measured at least."""
_STEP, _SEVERAL, _SEQUENCES, _HELD, _FEW_TOKENS, _TOKENS, _PAIRS, _MIXED, _REQUEST, _CACHED = range(10)
_PARTS = 10
_DRIFT = 0.08
"""Relative standard deviation between one opening of a model and another, which one alone cannot tell: by so much the
median of 24 times was off (0 to 25 %; tests/bench/timing_model.py)."""
_RIDGE = 1e-4
"""Of the squared length of a column, scaled to 1: what was never varied is known to within a hundred times itself."""
_LEAST = 1e-3
"""Share of its time that at least is predicted of a measurement."""
_OUTSIDE = 0.05
"""Share of the requests beyond each bar: nine in ten lie between them."""
_NORMAL = 1.6449
"""That quantile of normal errors, in standard deviations."""


@dataclass(frozen=True)
class Estimate:
    """Seconds; nine in ten requests are expected between ``low`` and ``high``."""

    seconds: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{short(self.seconds)} ({short(self.low)} to {short(self.high)})"


@dataclass(frozen=True)
class Beside:
    """What an engine has to do beside a request: sequences that decode, the tokens of their KV cache in all, and the
    tokens of each prompt that is to be run before."""

    decoding: int = 0
    held: int = 0
    prompts: Sequence[int] = ()


ALONE = Beside()


class TimingModel:
    """Of one variant on one device, opened in one way. Pure: the same question has the same answer."""

    def __init__(self, observations: Sequence[Observation], chunk: int) -> None:
        """``chunk``: tokens of a prompt in one step. NotMeasured where there are too few observations to tell what a
        token takes apart from what a step takes."""
        self.chunk = chunk
        firsts = [each for each in observations if isinstance(each, FirstToken)]
        later = [each for each in observations if isinstance(each, EachToken)]
        prompts, held = {each.prompt - each.cached for each in firsts}, {each.held for each in later}
        if len(prompts) < PROMPTS or len(held) < HELD or len(observations) <= PROMPTS + HELD:
            raise NotMeasured(
                f"first tokens of {len(prompts)} lengths of prompts and {len(held)} times per token were measured, "
                f"which is too little to go by: at least {PROMPTS} and {HELD}, with some of them twice, are needed; "
                "edge-glm bench REF measures them"
            )
        reached = [_Reach(each.prompt, each.prompt, each.beside + 1) for each in firsts]
        reached += [_Reach(0, each.held // each.batch, each.batch) for each in later]
        self._most = _Reach.of(reached)
        seconds = np.array([each.seconds for each in observations])
        rows = np.stack([self._parts_of(each) for each in observations]) / seconds[:, None]
        self._scale = np.sqrt((rows**2).sum(0))
        self._scale[self._scale == 0] = 1 / np.finfo(float).eps  # a part that no observation has is taken for free
        scaled = rows / self._scale
        found, weights = robust_nonnegative(scaled, np.ones(len(rows)))
        self._found = found / self._scale
        self._unknown = np.linalg.inv(scaled.T @ (scaled * weights[:, None]) + _RIDGE * np.eye(_PARTS))
        spread = [(each.fastest or each.seconds, each.seconds, each.slowest or each.seconds) for each in observations]
        relative = np.array(spread).T / seconds
        predicted = np.maximum(left_out(scaled, np.ones(len(rows)), weights), _LEAST)
        further = np.sqrt(1 + np.einsum("ij,jk,ik->i", scaled, self._unknown, scaled))
        self.above = _bar(((relative / predicted - 1) / further).ravel())
        self.below = _bar(((predicted / relative - 1) / further).ravel())
        """By what share a request like those that were measured may take more, or what is predicted be more than it."""

    def ttft(self, prompt: int, cached: int = 0, beside: Beside = ALONE) -> Estimate:
        """To the first token of a prompt of so many tokens, the first ``cached`` of which are known already.

        ValueError unless 0 ≤ cached < prompt.
        """
        if not 0 <= cached < prompt:
            raise ValueError(f"a prompt of {prompt} tokens cannot have {cached} that are known")
        parts = self._first(prompt, cached, beside)
        for other in beside.prompts:
            parts = parts + self._prompt(0, other, beside)
        return self._estimate(parts, _Reach(prompt, prompt, beside.decoding + 1))

    def running(self, prompt: int, cached: int = 0, beside: Beside = ALONE) -> float:
        """Seconds of it from when the prompt has got its place."""
        parts = self._prompt(cached, prompt, beside)
        parts[_CACHED] = cached
        return float(parts @ self._found)

    def tpot(self, context: int, batch: int = 1) -> Estimate:
        """From one token to the next while ``batch`` sequences decode, each with ``context`` tokens."""
        return self._estimate(_decoding(batch, batch * context), _Reach(0, context, batch))

    def total(self, prompt: int, new_tokens: int, cached: int = 0, batch: int = 1) -> Estimate:
        """Until ``new_tokens`` tokens are there, while ``batch`` − 1 others of that length decode beside."""
        held = (batch - 1) * prompt
        parts = self._first(prompt, cached, Beside(batch - 1, held))
        between = max(new_tokens - 1, 0)
        middle = prompt + new_tokens / 2  # the time of a step is linear in the context
        parts = parts + between * _decoding(batch, batch * middle)
        return self._estimate(parts, _Reach(prompt, prompt + new_tokens, batch))

    def _parts_of(self, observation: Observation) -> Vector:
        if isinstance(observation, EachToken):
            return _decoding(observation.batch, observation.held)
        return self._first(observation.prompt, observation.cached, Beside(observation.beside, observation.held))

    def _first(self, prompt: int, cached: int, beside: Beside) -> Vector:
        parts = self._prompt(cached, prompt, beside)
        parts[_REQUEST] = 1
        parts[_CACHED] = cached
        return parts + 0.5 * _decoding(beside.decoding, beside.held) if beside.decoding else parts

    def _prompt(self, start: int, stop: int, beside: Beside) -> Vector:
        """Of all steps that feed the tokens ``start`` to ``stop``."""
        parts = np.zeros(_PARTS)
        for first, length in chunks(start, stop, self.chunk):
            parts[_STEP] += 1
            parts[_SEVERAL] += length + beside.decoding > 1
            parts[_FEW_TOKENS] += min(length, FEW)
            parts[_TOKENS] += max(length - FEW, 0)
            parts[_PAIRS] += length * (first + (length + 1) / 2)
            parts[_SEQUENCES] += beside.decoding
            parts[_HELD] += beside.held
            parts[_MIXED] += beside.decoding > 0
        return parts

    def _estimate(self, parts: Vector, reach: _Reach) -> Estimate:
        seconds = float(parts @ self._found)
        relative = parts / seconds / self._scale
        further = math.sqrt(1 + float(relative @ self._unknown @ relative)) * reach.beyond(self._most)
        return Estimate(seconds, seconds / (1 + further * self.below), seconds * (1 + further * self.above))


@dataclass(frozen=True)
class _Reach:
    """The longest prompt and context and the most sequences of a request, or of all that was measured."""

    prompt: int
    context: int
    batch: int

    @classmethod
    def of(cls, reached: Sequence[_Reach]) -> _Reach:
        return cls(
            max(each.prompt for each in reached),
            max(each.context for each in reached),
            max(each.batch for each in reached),
        )

    def beyond(self, most: _Reach) -> float:
        """How many times further it goes than ``most``; 1: no further. The form itself is a guess out there."""
        return max(1.0, self.prompt / most.prompt, self.context / most.context, self.batch / most.batch)


def _bar(errors: Vector) -> float:
    """Relative, for a request like those that were measured; of those times longer, or shorter, by ``errors``."""
    return math.hypot(max(float(np.quantile(errors, 1 - _OUTSIDE)), 0.0), _NORMAL * _DRIFT)


def _decoding(batch: int, held: float) -> Vector:
    parts = np.zeros(_PARTS)
    parts[_STEP], parts[_SEVERAL], parts[_SEQUENCES], parts[_HELD] = 1, batch > 1, batch, held
    return parts


def short(seconds: float) -> str:
    """Two digits or three: 24 ms, 480 ms, 1.24 s, 12.4 s, 140 s."""
    if seconds < 0.9995:
        return f"{1e3 * seconds:.{1 if seconds < 0.00995 else 0}f} ms"
    return f"{seconds:.{2 if seconds < 9.995 else 1 if seconds < 99.95 else 0}f} s"
