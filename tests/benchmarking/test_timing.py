"""Figures from arrival times, against plain twins."""

from __future__ import annotations

import statistics
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.bench.local import Stream, shares
from edge_runtime.bench.result import Percentiles
from edge_runtime.bench.timing import (
    StreamTimes,
    decode_rate,
    itl_by_place_ms,
    percentiles_ms,
    prefill_rate,
    steady,
)
from edge_runtime.engine import EngineStats
from edge_runtime.tracing.trace import Trace

pieces = st.lists(st.tuples(st.floats(0.001, 10), st.integers(1, 4)), min_size=1, max_size=20)


def stream(submitted: float, steps: list[tuple[float, int]]) -> StreamTimes:
    """``steps``: (time since the piece before, tokens)."""
    times = submitted + np.cumsum([step for step, _ in steps])
    return StreamTimes(submitted, tuple(zip(times.tolist(), [tokens for _, tokens in steps], strict=True)))


def ticking(submitted: float, first: float, tokens: int, every: float) -> StreamTimes:
    return StreamTimes(submitted, tuple((first + index * every, 1) for index in range(tokens)))


def test_one_stream() -> None:
    times = StreamTimes(10.0, ((10.5, 1), (10.6, 1), (10.9, 2), (11.0, 1)))
    assert times.ttft == 0.5
    assert times.tokens == 5
    assert times.tpot == pytest.approx(0.5 / 4)
    assert [place for place, _ in times.gaps()] == [2, 3, 4, 5]
    assert [gap for _, gap in times.gaps()] == pytest.approx([0.1, 0.15, 0.15, 0.1])


def test_tokens_of_the_first_piece_took_no_decoding_that_was_seen() -> None:
    times = StreamTimes(0.0, ((1.0, 3), (2.0, 1)))
    assert times.tpot == 1.0
    assert times.gaps() == [(4, 1.0)]
    assert StreamTimes(0.0, ((1.0, 7),)).tpot is None


@given(st.floats(0, 100), pieces)
def test_gaps_make_the_whole(submitted: float, steps: list[tuple[float, int]]) -> None:
    times = stream(submitted, steps)
    gaps = [gap for _, gap in times.gaps()]
    assert len(gaps) == times.tokens - steps[0][1]
    assert sum(gaps) == pytest.approx(times.last - times.first)
    if times.tpot is not None:
        assert times.tpot == pytest.approx(statistics.mean(gaps))


def naive_percentile(values: list[float], level: float) -> float:
    """Between the two nearest ranks, in proportion."""
    ordered = sorted(values)
    rank = (len(ordered) - 1) * level / 100
    low = int(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=50))
def test_percentiles(seconds: list[float]) -> None:
    found = percentiles_ms(seconds)
    assert found is not None
    wanted = [naive_percentile(seconds, level) * 1e3 for level in (50, 95, 99)]
    assert [found.p50, found.p95, found.p99] == pytest.approx(wanted)


def test_percentiles_of_nothing() -> None:
    assert percentiles_ms([]) is None
    assert percentiles_ms([0.25]) == Percentiles(250.0, 250.0, 250.0)


def test_prefill_is_over_when_the_last_stream_has_its_first_token() -> None:
    streams = [ticking(0.0, 1.0, 3, 0.5), ticking(0.1, 4.0, 3, 0.5)]
    assert prefill_rate(streams, 200) == 100.0
    assert prefill_rate(streams[:1], 200) == 200.0


def test_decode_rate_of_one_stream_is_one_over_tpot() -> None:
    times = stream(0.0, [(3.0, 1), (0.1, 1), (0.3, 1), (0.1, 2)])
    assert times.tpot is not None
    assert decode_rate([times]) == pytest.approx(1 / times.tpot)


def test_decode_rate_counts_only_while_all_decode() -> None:
    early = ticking(0.0, 1.0, 100, 0.1)  # decodes from 1 to 10.9, much of it alone
    late = ticking(0.0, 5.0, 40, 0.2)  # from 5 to 12.8
    window = steady([early, late])
    assert window is not None
    assert (window[0], window[1]) == (late, early)
    inside = sum(5.0 < time <= early.last for each in (early, late) for time, _ in each.arrivals)
    assert decode_rate([early, late]) == pytest.approx(inside / (early.last - 5.0))
    assert decode_rate([early, late]) == pytest.approx(15, rel=0.05)  # 10 and 5 a second


def test_no_rate_without_a_time_in_which_all_decode() -> None:
    assert decode_rate([ticking(0.0, 1.0, 3, 0.1), ticking(0.0, 5.0, 3, 0.1)]) is None
    assert decode_rate([StreamTimes(0.0, ((1.0, 5),))]) is None


@given(st.lists(pieces, min_size=1, max_size=4))
def test_latency_by_place(many: list[list[tuple[float, int]]]) -> None:
    streams = [stream(0.0, steps) for steps in many]
    found = itl_by_place_ms(streams)
    places = sorted({place for each in streams for place, _ in each.gaps()})
    assert [place for place, _ in found] == places
    for place, value in found:
        gaps = [gap for each in streams for at, gap in each.gaps() if at == place]
        assert value == pytest.approx(statistics.median(gaps) * 1e3)


def stats(forward: float, inference: float) -> EngineStats:
    others = {field.name: 0 for field in fields(EngineStats)}
    return EngineStats(**{**others, "forward_seconds": forward, "inference_seconds": inference})  # type: ignore[arg-type]


def test_shares_are_of_the_steady_time() -> None:
    early = Stream(ticking(0.0, 1.0, 2, 8.0), stats(0.5, 0.4), stats(8.0, 7.0), 0, Trace())  # ends at 9
    late = Stream(ticking(0.0, 5.0, 2, 10.0), stats(5.0, 4.0), stats(13.0, 12.0), 0, Trace())  # begins at 5
    found = shares([[early, late]])
    assert found is not None
    assert found.inference == pytest.approx(3 / 4)
    assert found.device == pytest.approx(0)
    assert found.runtime == pytest.approx(1 / 4)
    assert shares([[Stream(StreamTimes(0.0, ((1.0, 5),)), stats(1, 1), stats(1, 1), 0, Trace())]]) is None


def test_shares_of_rounds_are_weighed_by_their_time() -> None:
    short = Stream(ticking(0.0, 1.0, 2, 1.0), stats(1.0, 1.0), stats(1.0, 1.0), 0, Trace())
    long = Stream(ticking(0.0, 1.0, 2, 3.0), stats(1.0, 1.0), stats(4.0, 3.0), 0, Trace())
    found = shares([[short], [long]])
    assert found is not None
    assert [found.inference, found.device, found.runtime] == pytest.approx([2 / 4, 1 / 4, 1 / 4])
