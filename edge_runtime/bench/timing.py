"""From the times at which an answer's pieces arrive to the figures that are reported.

The terms, as usual: time to first token (TTFT) is from the request to the first piece of text; time per output token
(TPOT) is a stream's mean time between tokens after that; inter-token latency (ITL) is each of those times.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edge_runtime.bench.result import Percentiles


@dataclass(frozen=True)
class StreamTimes:
    """One answer. Times are seconds of one clock."""

    submitted: float
    arrivals: tuple[tuple[float, int], ...]
    """(time, tokens) of each piece. Several tokens come at once where they make a character together."""

    @property
    def first(self) -> float:
        return self.arrivals[0][0]

    @property
    def last(self) -> float:
        return self.arrivals[-1][0]

    @property
    def ttft(self) -> float:
        return self.first - self.submitted

    @property
    def tokens(self) -> int:
        return sum(tokens for _, tokens in self.arrivals)

    @property
    def tpot(self) -> float | None:
        """None when everything came in one piece."""
        later = self.tokens - self.arrivals[0][1]
        return (self.last - self.first) / later if later else None

    def gaps(self) -> list[tuple[int, float]]:
        """(place in the answer, from 1; time it took) of each token after the first piece; tokens of one piece share
        its time."""
        found = []
        place = self.arrivals[0][1]
        for (before, _), (time, tokens) in itertools.pairwise(self.arrivals):
            found += [(place + each, (time - before) / tokens) for each in range(1, tokens + 1)]
            place += tokens
        return found


def percentiles_ms(seconds: Sequence[float]) -> Percentiles | None:
    """P50, P95 and P99 in milliseconds, interpolated linearly (numpy's default). None when there is nothing."""
    if not seconds:
        return None
    p50, p95, p99 = np.percentile(np.asarray(seconds) * 1e3, (50, 95, 99)).tolist()
    return Percentiles(p50, p95, p99)


def prefill_rate(streams: Sequence[StreamTimes], prompt_tokens: int) -> float:
    """Prompt tokens per second until the last of ``streams``, submitted together, has its first token."""
    return (
        len(streams) * prompt_tokens / (max(each.first for each in streams) - min(each.submitted for each in streams))
    )


def steady(streams: Sequence[StreamTimes]) -> tuple[StreamTimes, StreamTimes] | None:
    """The time in which all streams decode and none is prefilled: from the first token of the stream that began last
    to the end of the one that ended first. None when there is no such time.
    """
    begins, ends = max(streams, key=lambda each: each.first), min(streams, key=lambda each: each.last)
    return (begins, ends) if ends.last > begins.first else None


def decode_rate(streams: Sequence[StreamTimes]) -> float | None:
    """Tokens per second of all streams together in their :func:`steady` time."""
    window = steady(streams)
    if window is None:
        return None
    start, end = window[0].first, window[1].last
    tokens = sum(tokens for each in streams for time, tokens in each.arrivals if start < time <= end)
    return tokens / (end - start)


def itl_by_place_ms(streams: Sequence[StreamTimes]) -> list[tuple[int, float]]:
    """(place in the answer, median inter-token latency there over the streams), places in order."""
    gaps: dict[int, list[float]] = {}
    for stream in streams:
        for place, gap in stream.gaps():
            gaps.setdefault(place, []).append(gap)
    return [(place, statistics.median(gaps[place]) * 1e3) for place in sorted(gaps)]
