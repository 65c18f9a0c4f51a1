"""A machine whose every step takes a known time, and what would be measured on it."""

from __future__ import annotations

from typing import TypeVar

import msgspec
import numpy as np

from edge_runtime.chunks import chunks
from edge_runtime.timing.model import FEW
from edge_runtime.timing.observations import EachToken, FirstToken, Observation

CHUNK = 256
STEP, SEVERAL, SEQUENCE, HELD, FEW_TOKENS, TOKENS, PAIRS, MIXED, REQUEST, CACHED = (
    2e-3, 0.5e-3, 0.6e-3, 0.6e-6, 0.5e-3, 0.33e-3, 0.23e-6, 1e-3, 3e-3, 4e-6,
)  # fmt: skip
ALONE = (2000, 80, 1200, 200, 700, 400)
KNOWN = ((1200, 1000), (700, 400))
BATCHES = ((2, 700), (4, 300), (8, 120), (16, 60))


def seconds(observation: Observation) -> float:
    """Written down apart from the model, step by step."""
    if isinstance(observation, EachToken):
        several = SEVERAL if observation.batch > 1 else 0.0
        return STEP + several + SEQUENCE * observation.batch + HELD * observation.held
    took = REQUEST + CACHED * observation.cached
    if observation.beside:  # it comes in the middle of a step
        took += 0.5 * seconds(EachToken(batch=observation.beside, held=observation.held, seconds=0))
    for start, length in chunks(observation.cached, observation.prompt, CHUNK):
        took += STEP + SEQUENCE * observation.beside + HELD * observation.held
        took += SEVERAL if length + observation.beside > 1 else 0.0
        took += FEW_TOKENS * min(length, FEW) + TOKENS * max(length - FEW, 0)
        took += MIXED if observation.beside else 0.0
        took += PAIRS * sum(start + each + 1 for each in range(length))
    return took


def first(prompt: int, cached: int = 0, beside: int = 0, held: int = 0) -> FirstToken:
    return _timed(FirstToken(prompt=prompt, cached=cached, beside=beside, held=held, seconds=0))


def each(batch: int, context: int) -> EachToken:
    return _timed(EachToken(batch=batch, held=batch * context, seconds=0))


def observed(noise: float = 0.0, seed: int = 0) -> list[Observation]:
    """As a round of :mod:`edge_runtime.bench.requests`; ``noise``: standard deviation of the logarithm of a time."""
    found: list[Observation] = []
    for prompt in ALONE:
        found += [first(prompt), each(1, prompt + 6)]
    for prompt, cached in KNOWN:
        found += [first(prompt, cached), each(1, prompt + 6)]
    for batch, prompt in BATCHES:
        found += [each(batch, prompt + 10), first(2 * prompt, beside=batch, held=batch * (prompt + 20))]
    rng = np.random.default_rng(seed)
    return [msgspec.structs.replace(one, seconds=one.seconds * float(np.exp(noise * rng.normal()))) for one in found]


T = TypeVar("T", FirstToken, EachToken)


def _timed(observation: T) -> T:
    return msgspec.structs.replace(observation, seconds=seconds(observation))
