"""Spans: who was doing what, counted once, and kept as long as there is room."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from itertools import pairwise

import pytest

from edge_runtime.tracing import trace as tracing
from edge_runtime.tracing.chrome import chrome_trace
from edge_runtime.tracing.context import trace_parent
from edge_runtime.tracing.recorder import Recorder
from edge_runtime.tracing.ring import Ring
from edge_runtime.tracing.trace import TIER, Lane, Part, Trace, current, enter, leave, span


def test_a_lane_leaves_no_gaps_and_counts_nothing_twice() -> None:
    trace = Trace()
    lane = trace.lane("engine", 100)
    lane.mark("queue", 150)
    lane.stepped("prefill", 160, 200)
    lane.mark("sample", 210)
    lane.step_over(215)
    lane.step_over(300)
    spans = list(trace)
    assert [(each.part, each.start, each.end) for each in spans] == [
        ("queue", 100, 150),
        ("schedule", 150, 160),
        ("prefill", 160, 200),
        ("sample", 200, 210),
        ("batch", 210, 215),
        ("wait", 215, 300),  # a step without it
    ]
    assert trace.parts() == {"queue": 50, "schedule": 10, "prefill": 40, "sample": 10, "batch": 5, "wait": 85}


def test_spans_inside_spans_are_taken_out_of_them() -> None:
    trace = Trace()
    token = enter(trace.lane("server"))
    with span("route"):
        time.sleep(0.002)
        with span("template"):
            time.sleep(0.004)
        time.sleep(0.002)
    leave(token)
    parts = [each.part for each in trace if each.part != "other"]
    assert parts == ["route", "template", "route"]
    assert all(before.end == after.start for before, after in pairwise(trace))


def test_without_a_lane_nothing_is_written() -> None:
    assert current() is None
    with span("route"):
        assert current() is None


def test_what_is_covered_is_a_union() -> None:
    trace = Trace()
    trace.started = 0
    trace.add(trace.lane("a", 0)._number, "decode", 0, 60)
    trace.add(trace.lane("b", 0)._number, "send", 40, 80)
    trace.ended = 100
    assert trace.covered == pytest.approx(0.8)
    assert sum(trace.parts().values()) == 100


def test_a_trace_that_has_ended_is_nobodys_any_more() -> None:
    trace = Trace()
    token = enter(trace.lane("server"))
    context = copy_context()  # as a task that outlives the request has it
    leave(token)
    trace.finish()
    assert context.run(current) is None
    before, wall = len(trace), trace.wall
    trace.finish()
    assert (len(trace), trace.wall) == (before, wall)


def test_threads_write_at_once() -> None:
    trace = Trace()

    def write(number: int) -> None:
        lane = trace.lane(f"{number}", 0)
        for each in range(1, 2001):
            lane.mark("decode", each)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    for number in range(8):
        assert [each.end for each in trace if each.lane == f"{number}"] == list(range(1, 2001))


def test_a_very_long_answer_keeps_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "MOST_SPANS", 10)
    trace = Trace()
    trace.started = 0
    lane = trace.lane("engine", 0)
    for each in range(1, 101):
        lane.mark("decode", each)
    trace.ended = 100
    assert (len(trace), trace.parts(), trace.covered) == (10, {"decode": 100}, 1.0)


def test_the_ring_keeps_the_newest() -> None:
    """And of the newest of them their spans."""
    ring = Ring(spans=25, traces=4)
    made: list[Trace] = []
    for count in (10, 10, 10, 100, 1, 1, 1, 1, 1):
        trace = Trace()
        lane = trace.lane("engine", 0)
        for each in range(count):
            lane.mark("decode", each)
        trace.ended = trace.started + 1000
        told = trace.parts(), trace.covered
        ring.add(trace)
        made.append(trace)
        assert ring.newest(9) == made[:-5:-1]
        assert len(trace) == count  # however large
        assert sum(map(len, ring.newest(9))) <= max(25, count)
        assert (trace.parts(), trace.covered) == told
    assert [len(each) for each in made] == [0, 0, 0, 0, 0, 1, 1, 1, 1]
    assert made[3].parts() == {"decode": 99}


def test_spans_that_come_late_do_not_widen_the_ring() -> None:
    """Their threads notice the end of a request a little later."""
    ring = Ring(spans=100, traces=1000)
    for _ in range(100):
        trace = Trace()
        lane = trace.lane("engine", 0)
        for each in range(10):
            lane.mark("decode", each)
        ring.add(trace)
        for each in range(10):
            lane.mark("decode", each)
    assert [len(trace) for trace in ring.newest(1000)] == [20] * 10 + [0] * 90


def test_nothing_is_told_of_what_comes_after_the_end() -> None:
    trace = Trace()
    lane = trace.lane("engine", trace.started)
    lane.mark("prefill", trace.started + 10)
    trace.ended = trace.started + 30
    lane.mark("decode", trace.started + 50)  # the step that ran when the client left
    lane.mark("sample", trace.started + 60)
    assert trace.parts() == {"prefill": 10, "decode": 20}
    assert (len(trace), trace.covered) == (2, 1.0)


def test_a_thin_trace_keeps_its_sums_whoever_is_still_adding_or_reading() -> None:
    trace = Trace()
    lane, other = trace.lane("engine"), trace.lane(f"{TIER}cloud")
    lane.mark("prefill")
    other.mark("upstream")
    begun = time.perf_counter_ns()
    reading = iter(trace)
    first = next(reading)
    trace.finish()
    sums, covered, wall = dict(trace.parts()), trace.covered, trace.wall
    trace.thin()
    trace.add(0, "decode", begun, begun + 5)  # on its way when the request ended
    assert [first.lane, *(span.lane for span in reading)] == ["engine", f"{TIER}cloud"]
    assert list(trace) == []
    assert (dict(trace.parts()), trace.covered, trace.wall) == (sums, covered, wall)
    assert set(sums) == {"prefill", "upstream cloud"}


def test_a_span_that_is_being_added_while_its_trace_becomes_thin_is_dropped() -> None:
    trace = Trace()
    lane = trace.lane("engine")
    trace.finish()

    class Meanwhile(defaultdict[Part, int]):
        def __missing__(self, part: Part) -> int:
            trace.thin()
            return super().__missing__(part)

    trace._lanes[0] = trace._lanes[0]._replace(sums=Meanwhile(int))
    trace.add(lane._number, "decode", trace.started, trace.started + 5)
    assert list(trace) == []
    assert chrome_trace([trace])["traceEvents"]


def test_a_trace_that_becomes_thin_while_it_is_read_tells_the_same() -> None:
    class Watched(Trace):
        """Becomes thin once somebody has seen that it is not."""

        kept: dict[str, int] | None = None
        looked_at = False

        @property  # type: ignore[override]
        def _sums(self) -> dict[str, int] | None:
            seen = self.kept
            if self.looked_at:
                self.looked_at = False
                self.thin()
            return seen

        @_sums.setter
        def _sums(self, sums: dict[str, int] | None) -> None:
            self.kept = sums

    trace = Watched()
    trace.lane("engine", trace.started).mark("decode", trace.started + 5)
    trace.finish()
    trace.looked_at = True
    assert trace.parts() == trace.parts() == {"decode": 5}


def test_a_chunk_that_is_put_while_one_is_read_takes_no_time_back(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = Trace()
    lane = trace.lane("server")
    clock = time.perf_counter_ns

    def engine_puts_one() -> int:
        now = clock()
        trace.put_at = clock()
        return now

    trace.put_at = clock()
    monkeypatch.setattr(time, "perf_counter_ns", engine_puts_one)
    lane.delivered()
    assert trace.parts()["deliver"] >= 0


def test_a_paused_lane_counts_nothing_however_it_goes_on() -> None:
    trace = Trace()
    ways: list[Callable[[Lane], object]] = [
        lambda lane: lane.mark("send"),
        lambda lane: lane.begin("send"),
        lambda lane: lane.pause(),
        lambda lane: lane.delivered(),
        lambda lane: lane.resume(),
        lambda lane: lane.stepped("decode", time.perf_counter_ns(), time.perf_counter_ns() + 1),
    ]
    for goes_on in ways:
        lane = trace.lane("server")
        lane.pause()
        time.sleep(0.02)
        goes_on(lane)
        lane.mark("send")
    assert sum(trace.parts().values()) < 20e6
    lane.mark("send")
    time.sleep(0.02)
    lane.mark("judge")  # it has gone on
    assert trace.parts()["judge"] >= 20e6


def test_threads_open_lanes_at_once() -> None:
    trace = Trace()

    def opens(number: int) -> None:
        for _ in range(500):
            trace.lane(f"{number}", 0).mark("decode", number)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(opens, range(8)))
    assert all(span.lane == f"{span.end}" for span in trace)


def test_a_sink_that_fails_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[Trace] = []

    def fails(trace: Trace) -> None:
        raise OSError("no")

    recorder = Recorder([fails, seen.append])
    recorder.keep(Trace())
    recorder.keep(Trace())
    assert len(seen) == len(recorder.ring.newest(9)) == 2
    assert caplog.text.count("not passed on any more") == 1


def test_chrome_trace() -> None:
    """As the Trace Event Format has it: complete events in microseconds, lanes as named threads."""
    trace = Trace()
    trace.say(path="/v1/chat/completions", model="m")
    trace.lane("server", trace.started).mark("receive", trace.started + 5_000)
    trace.lane("engine", trace.started + 5_000).mark("queue", trace.started + 9_000)
    trace.ended = trace.started + 10_000
    events = chrome_trace([trace])["traceEvents"]
    assert {event["args"]["name"] for event in events if event["ph"] == "M"} == {
        f"/v1/chat/completions m {trace.id[:8]}",
        "server",
        "engine",
    }
    spans = {event["name"]: event for event in events if event["ph"] == "X"}
    assert spans["request"]["dur"] == 10
    assert (spans["receive"]["dur"], spans["queue"]["dur"]) == (5, 4)
    assert spans["queue"]["ts"] - spans["request"]["ts"] == pytest.approx(5)
    assert spans["queue"]["tid"] != spans["receive"]["tid"]


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "00-0-0-00",
        f"00-{'0' * 32}-{'1' * 16}-01",
        f"ff-{'1' * 32}-{'1' * 16}-01",
        f"00-{'g' * 32}-{'1' * 16}-01",
    ],
)
def test_malformed_parents_are_passed_over(header: str | None) -> None:
    assert trace_parent(header) == (None, None, True)


def test_parents() -> None:
    assert trace_parent(f"00-{'a' * 32}-{'b' * 16}-01") == ("a" * 32, "b" * 16, True)
    assert trace_parent(f"00-{'a' * 32}-{'b' * 16}-00") == ("a" * 32, "b" * 16, False)
    assert trace_parent(f"00-{'a' * 32}-{'b' * 16}-02") == ("a" * 32, "b" * 16, False)
    assert trace_parent(f"01-{'a' * 32}-{'b' * 16}-01-later") == ("a" * 32, "b" * 16, True)  # of a version to come


def test_lanes_belong_to_who_starts_them() -> None:
    trace = Trace()
    token = enter(trace.lane("server"))
    seen: list[object] = []
    thread = threading.Thread(target=lambda: seen.append(copy_context().run(current)))
    thread.start()
    thread.join()
    leave(token)
    assert current() is None
