"""ONNX Runtime's profile of a session: what it says of its operators, call by call.

It is a JSON file of Chrome's trace events, written when the profiling ends: an event for each operator (category
``Node``, named after the node) and, behind them, one for each call (``model_run``), times in microseconds
(https://onnxruntime.ai/docs/performance/tune-performance/profiling-tools.html).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from devices.errors import EngineError
from devices.onnx_nodes import read_products
from devices.profiling import Event, OperatorTime, Phase, Product
from devices.stopwatch import Stopwatch

_SUFFIX = "_kernel_time"
_SCALE = 1e-6


class _Arguments(msgspec.Struct, frozen=True):
    op_name: str = ""
    output_type_shape: list[dict[str, list[int]]] = []


class _Entry(msgspec.Struct, frozen=True):
    cat: str
    name: str
    ts: float
    dur: float
    args: _Arguments = _Arguments()


class _Began(msgspec.Struct, frozen=True):
    """Where a phase began."""

    name: str
    calls: int
    seconds: float


class OnnxRuntimeCounters:
    """Implements :class:`devices.profiling.Counters` over a session that was opened with a profile."""

    def __init__(self, session: Any, model: Path, stopwatch: Stopwatch) -> None:
        """``stopwatch``: that in which each call of the session runs."""
        self._session = session
        self._model = model
        self._stopwatch = stopwatch
        self._began: list[_Began] = []

    def begin(self, name: str) -> None:
        self._began.append(_Began(name, self._stopwatch.laps, self._stopwatch.seconds))

    def finish(self) -> tuple[Phase, ...]:
        self.begin("")  # an end for the last
        session, self._session = self._session, None
        calls = read_profile(Path(session.end_profiling()))
        if len(calls) != self._stopwatch.laps:
            raise EngineError(
                f"ONNX Runtime tells of {len(calls)} calls, and there were {self._stopwatch.laps}: its profile holds a "
                "million events; profile a shorter run"
            )
        products = read_products(self._model)
        return tuple(
            Phase(
                one.name,
                two.calls - one.calls,
                two.seconds - one.seconds,
                tuple(_operators(calls[one.calls : two.calls], products)),
                tuple(_events(_typical(calls[one.calls : two.calls]))),
            )
            for one, two in zip(self._began, self._began[1:], strict=False)
            if two.calls > one.calls
        )


Call = tuple[_Entry, list[_Entry]]
"""The call itself, and its operators in order."""


def read_profile(path: Path) -> list[Call]:
    """EngineError if ONNX Runtime has written none, or in another form."""
    try:
        entries = msgspec.json.decode(path.read_bytes(), type=list[_Entry])
    except (OSError, msgspec.DecodeError) as error:
        raise EngineError(f"cannot read the profile that ONNX Runtime should have written, {path}: {error}") from error
    calls: list[Call] = []
    nodes: list[_Entry] = []
    for entry in entries:
        if entry.cat == "Node" and entry.name.endswith(_SUFFIX):
            nodes.append(entry)
        elif entry.name == "model_run":
            calls.append((entry, nodes))
            nodes = []
    return calls


def _operators(calls: Sequence[Call], products: dict[str, Product]) -> Iterator[OperatorTime]:
    found: defaultdict[tuple[str, str], list[_Entry]] = defaultdict(list)
    for _, nodes in calls:
        for node in nodes:
            found[node.name.removesuffix(_SUFFIX), node.args.op_name].append(node)
    for (name, kind), entries in found.items():
        product = products.get(name)
        ran, rows = len(entries), 0
        if product is not None:
            met = [_values(entry) // product.outputs for entry in entries]
            ran, rows = sum(each > 0 for each in met), sum(met)
        yield OperatorTime(name, kind, sum(each.dur for each in entries) * _SCALE, ran, product, rows)


def _typical(calls: Sequence[Call]) -> Call:
    """The one in the middle, by how long they took."""
    return sorted(calls, key=lambda call: call[0].dur)[len(calls) // 2]


def _events(call: Call) -> Iterator[Event]:
    run, nodes = call
    for node in nodes:
        yield Event(node.name.removesuffix(_SUFFIX), node.args.op_name, (node.ts - run.ts) * _SCALE, node.dur * _SCALE)


def _values(entry: _Entry) -> int:
    """Elements of its first output."""
    return next((math.prod(dims) for dims in entry.args.output_type_shape[0].values()), 0)
