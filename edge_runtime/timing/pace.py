"""How fast the machine is just now, beside what was measured: others' work and heat slow it down for minutes."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from edge_runtime.timing.model import Beside, TimingModel

MOST = 8
"""First tokens that are looked at, the newest."""
LEAST = 3
"""With fewer nothing is said."""
FORGOTTEN_S = 300.0
SLOWEST, FASTEST = 4.0, 0.5
"""Bounds of what is believed."""
NOISE = 0.15
"""So far from 1 a ratio says nothing."""


class Begun(NamedTuple):
    """A prompt that was given a place."""

    at: float
    """Of :func:`time.monotonic`."""
    prompt: int
    """Tokens."""
    cached: int
    beside: int
    """Others that were running."""
    held: int
    """Tokens of their KV cache."""


class _First(NamedTuple):
    begun: Begun
    at: float


class Pace:
    """The first tokens that an engine made lately. One thread notes them, any may ask."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._firsts: deque[_First] = deque(maxlen=MOST)

    def begin(self, prompt: int, cached: int, beside: int, held: int) -> Begun:
        return Begun(self._clock(), prompt, cached, beside, held)

    def first_token(self, begun: Begun) -> None:
        """It is there."""
        self._firsts.append(_First(begun, self._clock()))

    def ratio(self, model: TimingModel) -> float:
        """Times that first tokens took lately over those that ``model`` tells; 1 where too little is known, or it
        makes no difference. The median, so that one request that was held up says nothing of the machine."""
        since = self._clock() - FORGOTTEN_S
        ratios = [
            (first.at - first.begun.at) / _told(model, first.begun)
            for first in self._firsts.copy()
            if first.at >= since
        ]
        if len(ratios) < LEAST:
            return 1.0
        found = min(max(statistics.median(ratios), FASTEST), SLOWEST)
        return 1.0 if abs(found - 1) < NOISE else found


def _told(model: TimingModel, begun: Begun) -> float:
    return model.running(begun.prompt, begun.cached, Beside(begun.beside, begun.held))
