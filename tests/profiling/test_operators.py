"""From what an engine counted to shares of what the machine can do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from devices.base import DecoderOptions, DecoderSpec, Step
from devices.errors import DeviceUnavailable, EngineError
from devices.host import Memory
from devices.profiling import Event, OperatorTime, Phase, Product
from edge_runtime.profiling import limits, operators
from edge_runtime.profiling.charts import call_chart
from edge_runtime.profiling.operators import Counted, Shape, Work, count, groups, phase_of
from edge_runtime.profiling.result import Limits
from tests.fake_decoder import FakeDecoder

ROOM = Limits(bytes=1e9, float_operations=1e9, integer_operations=4e9)
CODES, FLOATS = Product(100, 200, 10_000, integer=True), Product(100, 200, 80_000, integer=False)


def phase(*found: OperatorTime, seconds: float = 1.0, calls: int = 10) -> Phase:
    return Phase("decode", calls, seconds, found, ())


def test_layers_are_one_group_and_the_hottest_is_first() -> None:
    layers = [OperatorTime(f"layer {n}", "MatMul", 0.1, 10, CODES, 10) for n in range(3)]
    head = OperatorTime("head", "MatMul", 0.2, 10, FLOATS, 10)
    first, second, third = groups(phase(OperatorTime("norm", "Norm", 0.05, 10), head, *layers), Work(10, 0, 0), ROOM)
    assert (first.kind, first.shape, first.operators) == ("MatMul", "100 → 200", 3)
    assert (second.kind, second.shape, second.operators) == ("MatMul", "100 → 200", 1)  # of floats
    assert (third.kind, third.shape, third.operators) == ("Norm", "", 1)


def test_shares_of_bandwidth_and_arithmetic() -> None:
    (codes,) = groups(phase(OperatorTime("a", "MatMul", 0.5, 10, CODES, 20)), Work(10, 0, 0), ROOM)
    assert codes.ms == pytest.approx(50)
    assert codes.share == pytest.approx(0.5)
    assert codes.of_bandwidth == pytest.approx(10 * 10_000 / 0.5 / 1e9)
    assert codes.of_arithmetic == pytest.approx(2 * 20 * 100 * 200 / 0.5 / 4e9)
    (floats,) = groups(phase(OperatorTime("a", "MatMul", 0.5, 10, FLOATS, 20)), Work(10, 0, 0), ROOM)
    assert floats.of_arithmetic == pytest.approx(2 * 20 * 100 * 200 / 0.5 / 1e9)


def test_without_kernels_integers_are_held_against_floats() -> None:
    room = Limits(1e9, 1e9, None)
    (codes,) = groups(phase(OperatorTime("a", "MatMul", 0.5, 10, CODES, 20)), Work(10, 0, 0), room)
    assert codes.of_arithmetic == pytest.approx(2 * 20 * 100 * 200 / 0.5 / 1e9)


def test_attention_is_told_by_the_steps() -> None:
    both = [OperatorTime(f"layer {n}", "PagedAttention", 0.1, 10) for n in range(2)]
    (group,) = groups(phase(*both), Work(10, 6_000_000, 4_000_000), ROOM)
    assert group.of_arithmetic == pytest.approx(6_000_000 / 0.2 / 1e9)
    assert group.of_bandwidth == pytest.approx(4_000_000 / 0.2 / 1e9)


def test_what_is_not_known_is_not_made_up() -> None:
    (group,) = groups(phase(OperatorTime("a", "Norm", 0.5, 10)), Work(10, 0, 0), ROOM)
    assert (group.of_bandwidth, group.of_arithmetic) == (None, None)
    (nothing,) = groups(phase(OperatorTime("a", "MatMul", 0.0, 10, CODES, 10)), Work(10, 0, 0), ROOM)
    assert (nothing.of_bandwidth, nothing.of_arithmetic) == (None, None)


def test_a_phase_in_calls() -> None:
    found = phase_of(
        Counted(phase(OperatorTime("a", "Norm", 0.5, 10), OperatorTime("b", "Add", 0.3, 10)), Work(80, 0, 0)), ROOM, 7.5
    )
    assert (found.calls, found.tokens, found.plain_ms) == (10, 8, 7.5)
    assert found.ms == pytest.approx(100)
    assert found.operators_ms == pytest.approx(80)


# ---- the steps


class CountedFake(FakeDecoder):
    """With counters that note the steps of each phase: (tokens held, tokens, rows), call by call."""

    def __init__(self) -> None:
        super().__init__(max_context=64, max_sequences=2, prefill_chunk=8, before_forward=self._note)
        self.counters = self
        self.name = ""
        self.calls: dict[str, list[list[tuple[int, int, int]]]] = {}

    def _note(self, batch: Sequence[Step]) -> None:
        steps = [(step.sequence.length, len(step.tokens), step.rows) for step in batch]
        self.calls.setdefault(self.name, []).append(steps)

    def begin(self, name: str) -> None:
        self.name = name

    def finish(self) -> tuple[Phase, ...]:
        return tuple(Phase(name, len(calls), 1.0, (), ()) for name, calls in self.calls.items() if name)


SPEC = DecoderSpec("onnxruntime", Path("m"), 2, 4, 2, 16, 64, 64, sliding_windows=(None, 5))


def test_steps_are_those_of_the_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = CountedFake()
    monkeypatch.setattr(operators, "open_decoder", lambda spec, device, options: decoder)
    prefill, decode = count(SPEC, "fake:cpu", DecoderOptions(), Shape(18, 4, 2, seed=0))
    prompt = [[(0, 8, 0)], [(8, 8, 0)], [(16, 2, 1)]]
    assert decoder.calls["prefill"] == prompt * 2  # a prompt after the other
    assert decoder.calls["decode"] == [[(18 + n, 1, 1)] * 2 for n in range(3)]  # the first token is the prompts'
    assert decoder.closed
    assert (prefill.work.tokens, decode.work.tokens) == (36, 6)
    # of the layer without a window, and of the one that sees five tokens
    seen = sum(range(1, 19)) + sum(min(place, 5) for place in range(1, 19))
    assert prefill.work.attention_operations == 2 * 4 * 4 * 16 * seen
    assert decode.work.attention_operations == 2 * 4 * 4 * 16 * (19 + 20 + 21 + 3 * 5)
    of_a_layer = decoder.limits.kv_bytes_per_token / 2
    assert decode.work.attention_bytes == int(2 * of_a_layer * (19 + 20 + 21 + 3 * 5))
    assert prefill.work.attention_bytes == int(2 * of_a_layer * (8 + 16 + 18 + 8 + (8 + 4) + (2 + 4)))


def test_a_device_without_counters_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = FakeDecoder()
    monkeypatch.setattr(operators, "open_decoder", lambda spec, device, options: decoder)
    with pytest.raises(EngineError, match="fake:cpu has no counters that can be read"):
        count(SPEC, "fake:cpu", DecoderOptions(), Shape(18, 4, 1, seed=0))
    assert decoder.closed


def test_a_chart_of_a_call() -> None:
    events = (Event("a", "MatMul", 0.001, 0.002), Event("b", "Add", 0.003, 0.001))
    chart = call_chart(Phase("decode", 1, 0.004, (), events))
    assert chart is not None
    assert chart.length == pytest.approx(4000)
    assert [(row.name, [bar.name for bar in row.bars]) for row in chart.rows] == [
        ("call", ["decode"]),
        ("operator", ["MatMul", "Add"]),
        ("node", ["a", "b"]),
    ]
    assert call_chart(Phase("decode", 1, 0.004, (), ())) is None


def test_limits_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "READ_BYTES", 8 << 20)
    monkeypatch.setattr(limits, "_SIDE", 64)
    monkeypatch.setattr(limits, "_PRODUCTS_S", 0.01)
    monkeypatch.setattr(limits, "peak_rate", lambda threads, floats: 1e11 if floats else 5e11)
    found = limits.measure_limits(1 << 30)
    assert found.bytes is not None
    assert found.bytes > 1e8
    assert (found.float_operations, found.integer_operations) == (1e11, 5e11)

    def without(threads: int, floats: bool) -> float:
        raise DeviceUnavailable("no kernels")

    monkeypatch.setattr(limits, "peak_rate", without)
    found = limits.measure_limits(1 << 30)
    assert found.float_operations > 1e7
    assert found.integer_operations is None


@pytest.mark.parametrize(
    ("free", "most", "read"),
    [
        (64 << 30, 64 << 30, limits.READ_BYTES),
        (1 << 30, 64 << 30, 256 << 20),
        (64 << 30, 100 << 20, 100 << 20),
        (250 << 20, 64 << 30, None),
        (64 << 30, 60 << 20, None),
    ],
)
def test_memory_is_measured_with_what_there_is(
    free: int, most: int, read: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A box that is short of it would end the process, and all that was measured would be lost."""
    taken: list[int] = []

    def read_rates(nbytes: int) -> list[float]:
        taken.append(nbytes)
        return [1e9, 2e9]

    monkeypatch.setattr(limits, "host_memory", lambda: Memory(64 << 30, free))
    monkeypatch.setattr(limits, "peak_rate", lambda threads, floats: 1e11)
    monkeypatch.setattr(limits, "read_rates", read_rates)
    assert limits.measure_limits(most).bytes == (None if read is None else 2e9)
    assert taken == ([] if read is None else [read])


def test_without_a_bandwidth_there_is_no_share_of_it() -> None:
    (codes,) = groups(phase(OperatorTime("a", "MatMul", 0.5, 10, CODES, 20)), Work(10, 0, 0), Limits(None, 1e9, 4e9))
    assert codes.of_bandwidth is None
    assert codes.of_arithmetic is not None


def test_a_limit_is_what_was_reached_at_best() -> None:
    assert limits.higher(Limits(1, 5, None), Limits(2, 4, None)) == Limits(2, 5, None)
    assert limits.higher(Limits(1, 5, 7), Limits(2, 4, 6)) == Limits(2, 5, 7)
    assert limits.higher(Limits(None, 5, 7), Limits(2, 4, 6)) == Limits(2, 5, 7)
    assert limits.higher(Limits(None, 5, 7), Limits(None, 4, 6)) == Limits(None, 5, 7)
