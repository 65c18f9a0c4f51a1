"""How many requests each caller may send: a bucket that fills steadily and holds a minute's worth."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

MOST = 10_000
"""Callers that are remembered; those not seen for longest are forgotten, and have a full bucket again."""


@dataclass
class _Bucket:
    tokens: float
    at: float


class RateLimit:
    """Of one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()

    def take(self, caller: str, per_minute: int) -> float:
        """0 if ``caller`` may ask now, which counts; else the seconds until it may, and nothing counts."""
        now = self._clock()
        bucket = self._buckets.pop(caller, None) or _Bucket(per_minute, now)
        bucket.tokens = min(bucket.tokens + (now - bucket.at) * per_minute / 60, per_minute)
        bucket.at = now
        self._buckets[caller] = bucket
        if len(self._buckets) > MOST:
            self._buckets.popitem(last=False)
        if bucket.tokens < 1:
            return (1 - bucket.tokens) * 60 / per_minute
        bucket.tokens -= 1
        return 0.0
