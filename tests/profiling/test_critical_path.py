"""What the end of a request had to wait for, on traces made by hand."""

from __future__ import annotations

import random
import statistics
from itertools import pairwise

import pytest

from edge_runtime.profiling.critical_path import UNTOLD, chain, critical_path
from edge_runtime.profiling.parts import part_times, step_ms
from edge_runtime.tracing.trace import PARTS, Part, Trace
from tests.profiling.profiles import MS, make_trace, two_lanes


def told(trace: Trace) -> list[tuple[str, str, int, int]]:
    """In milliseconds from the beginning."""
    return [
        (link.part, link.lane, (link.start - trace.started) // MS, (link.end - trace.started) // MS)
        for link in chain(trace)
    ]


def test_a_lane_that_waited_hands_over_to_the_one_that_was_busy() -> None:
    assert told(two_lanes(4)) == [
        ("tokenize", "caller", 0, 2),
        ("queue", "engine", 2, 5),
        ("prefill", "engine", 5, 15),
        ("sample", "engine", 15, 16),
        ("detokenize", "engine", 16, 18),
        ("decode", "engine", 18, 22),
        ("sample", "engine", 22, 23),
        ("deliver", "caller", 23, 25),
        ("other", "caller", 25, 28),
    ]


def test_what_woke_the_caller_counts_until_then_only() -> None:
    trace = make_trace(
        12, engine=[("decode", 0, 6), ("detokenize", 6, 10)], caller=[("deliver", 8, 9), ("serialize", 9, 12)]
    )
    assert told(trace) == [
        ("decode", "engine", 0, 6),
        ("detokenize", "engine", 6, 8),
        ("deliver", "caller", 8, 9),
        ("serialize", "caller", 9, 12),
    ]


def test_a_lane_that_worked_on_is_not_left() -> None:
    """Though another one was busy, too."""
    trace = make_trace(10, engine=[("decode", 0, 9)], caller=[("route", 0, 4), ("serialize", 4, 10)])
    assert told(trace) == [("route", "caller", 0, 4), ("serialize", "caller", 4, 10)]


def test_time_of_which_nobody_told_is_said() -> None:
    trace = make_trace(20, engine=[("queue", 3, 5), ("decode", 8, 15)])
    assert told(trace) == [
        (UNTOLD, "", 0, 3),
        ("queue", "engine", 3, 5),
        (UNTOLD, "", 5, 8),
        ("decode", "engine", 8, 15),
        (UNTOLD, "", 15, 20),
    ]


def test_a_trace_without_spans() -> None:
    assert told(make_trace(7)) == [(UNTOLD, "", 0, 7)]


@pytest.mark.parametrize("seed", range(30))
def test_it_has_no_gaps_and_makes_the_whole_time(seed: int) -> None:
    rng = random.Random(seed)
    lanes: dict[str, list[tuple[Part, int, int]]] = {}
    for name in ("caller", "engine", "completion 1"):
        at, spans = rng.randrange(5), []
        while at < 60:
            length = rng.randrange(1, 9)
            spans.append((rng.choice(PARTS), at, at + length))
            at += length + rng.choice((0, 0, 3))
        lanes[name] = spans
    trace = make_trace(64, **lanes)
    links = chain(trace)
    assert links[0].start == trace.started
    assert links[-1].end == trace.ended
    assert all(before.end == after.start for before, after in pairwise(links))
    path = critical_path(trace, "median")
    assert sum(part.share for part in path.parts) == pytest.approx(1)
    assert sum(part.ms for part in path.parts) == pytest.approx(path.wall_ms) == 64
    assert sum(part.links for part in path.parts) == len(links)
    assert sum(each.critical for each in part_times([trace])) == pytest.approx(1)


def test_parts_over_requests() -> None:
    traces = [two_lanes(decode) for decode in (4, 5, 6, 7, 20)]
    found = {each.part: each for each in part_times(traces)}
    assert list(found) == [part for part in PARTS if part in found]
    decode = found["decode"].ms
    assert (decode.p50, decode.iqr) == (6, 2)
    assert decode.p95 == pytest.approx(17.4)  # 7 + 0.8 · 13
    wall = sum(24 + each for each in (4, 5, 6, 7, 20))
    assert found["decode"].share == pytest.approx(42 / wall)
    assert found["deliver"].share == pytest.approx(5 * 4 / wall)
    assert found["deliver"].critical == pytest.approx(5 * 2 / wall)  # the first went on beside the engine
    assert found["prefill"].critical == found["prefill"].share


def test_tiers_elsewhere_are_told_one_by_one() -> None:
    lanes: dict[str, list[tuple[Part, int, int]]] = {"tier a": [("upstream", 0, 4)], "tier b": [("upstream", 3, 10)]}
    found = part_times([make_trace(10, **lanes)])
    assert [(each.part, each.ms.p50, each.critical) for each in found] == [
        ("upstream a", 4, pytest.approx(0.3)),
        ("upstream b", 7, pytest.approx(0.7)),
    ]


def test_a_request_without_a_part_spent_nothing_on_it() -> None:
    without = make_trace(10, engine=[("decode", 0, 10)])
    found = {each.part: each.ms for each in part_times([without, without, two_lanes()])}
    assert found["prefill"].p50 == 0
    assert found["prefill"].p99 == pytest.approx(9.8)


def at_once(*spans: tuple[Part, int, int]) -> Trace:
    """Milliseconds of one clock for all traces."""
    trace = Trace()
    trace.started, trace.ended = 0, 1000 * MS
    trace.lane("engine")
    for part, start, end in spans:
        trace.add(0, part, start * MS, end * MS)
    return trace


def test_a_step_beside_a_prompt_is_no_step_of_decoding() -> None:
    one = at_once(("prefill", 0, 90), ("decode", 90, 94), ("decode", 94, 184), ("decode", 184, 190))
    two = at_once(("queue", 0, 94), ("prefill", 94, 184), ("decode", 184, 190))
    assert step_ms([one, two], "decode") == pytest.approx(statistics.median([5, 6]))
    assert step_ms([one, two], "prefill") == 90
    assert step_ms([at_once(("prefill", 94, 184)), at_once(("decode", 94, 184))], "decode") is None


def test_chunks_of_a_prompt_count_together() -> None:
    """As in the calls that were counted; and a request that met a hiccup does not change what is usual."""
    usual = [at_once(("prefill", at, at + 90), ("prefill", at + 90, at + 120)) for at in (0, 120)]
    assert step_ms([*usual, at_once(("prefill", 240, 900), ("prefill", 900, 930))], "prefill") == 60
    assert step_ms(usual, "decode") is None
