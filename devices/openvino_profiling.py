"""OpenVINO's performance counters: what they say of the operators of a compiled model.

``InferRequest.get_profiling_info`` gives for each operator the mean of all its runs since the model was compiled, in
whole microseconds. Sums of a phase are differences of mean × runs; each is off by up to a microsecond a run, which
matters for operators that take a few of them. When an operator ran within a call, OpenVINO does not tell.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from devices.openvino_graph import engine_errors
from devices.profiling import OperatorTime, Phase, Product
from devices.stopwatch import Stopwatch

_PRODUCTS = ("FullyConnected", "MatMul")
_WEIGHTS_INPUT = 1


class _Counts(NamedTuple):
    """Since the model was compiled."""

    laps: int = 0
    seconds: float = 0.0
    tokens: int = 0
    rows: int = 0
    """Of logits."""
    head_calls: int = 0
    """In which any were asked for: in others the head's weights are not read."""


class OpenVinoCounters:
    """Implements :class:`devices.profiling.Counters` over a model that was compiled to be profiled."""

    def __init__(self, compiled: Any, vocab_size: int, stopwatch: Stopwatch) -> None:
        """``stopwatch``: that in which each inference runs."""
        self._compiled = compiled
        self._vocab_size = vocab_size
        self._stopwatch = stopwatch
        self._request: Any = None
        self._tokens = self._rows = self._head_calls = 0
        self._name: str | None = None
        self._at = _Counts()
        self._before: dict[tuple[str, str], float] = {}
        self._phases: list[Phase] = []

    def ran(self, request: Any, tokens: int, rows: int) -> None:
        """``request`` has computed ``tokens`` tokens, and logits of ``rows``."""
        self._request = request
        self._tokens += tokens
        self._rows += rows
        self._head_calls += rows > 0

    def begin(self, name: str) -> None:
        self._end()
        self._name = name

    def finish(self) -> tuple[Phase, ...]:
        self._end()
        self._request = self._compiled = None
        return tuple(self._phases)

    def _end(self) -> None:
        """Of the phase, or of what was before the first."""
        began = self._at
        at = self._at = _Counts(
            self._stopwatch.laps, self._stopwatch.seconds, self._tokens, self._rows, self._head_calls
        )
        now, before = self._sums(), self._before
        self._before = now
        laps = at.laps - began.laps
        if self._name is None or laps == 0:
            return
        products = self._products()
        operators = []
        for (name, kind), total in now.items():
            took = total - before.get((name, kind), 0.0)
            product = products.get(name)
            if took > 0 or product is not None:
                calls, rows = laps, 0 if product is None else at.tokens - began.tokens
                if product is not None and product.outputs == self._vocab_size:
                    calls, rows = at.head_calls - began.head_calls, at.rows - began.rows
                operators.append(OperatorTime(name, kind, max(took, 0.0), calls, product, rows))
        self._phases.append(Phase(self._name, laps, at.seconds - began.seconds, tuple(operators), ()))

    def _sums(self) -> dict[tuple[str, str], float]:
        """Seconds of each operator since the model was compiled."""
        if self._request is None:
            return {}
        with engine_errors("reading its performance counters"):
            return {
                (each.node_name, each.node_type): each.real_time.total_seconds() * self._stopwatch.laps
                for each in self._request.get_profiling_info()
                if each.status.name == "EXECUTED"
            }

    def _products(self) -> dict[str, Product]:
        with engine_errors("reading the graph that it runs"):
            return dict(_find_products(self._compiled.get_runtime_model()))


def _find_products(graph: Any) -> Iterator[tuple[str, Product]]:
    for node in graph.get_ordered_ops():
        if _kind(node) not in _PRODUCTS or node.get_input_size() <= _WEIGHTS_INPUT:
            continue
        constants = {
            index: (list(source.output(0).get_partial_shape().get_min_shape()), _bits(node.input(index)))
            for index in range(1, node.get_input_size())
            if _kind(source := node.input_value(index).get_node()) == "Const"
        }
        dims, bits = constants.get(_WEIGHTS_INPUT, ([], 0))
        if len(dims) == 2:
            nbytes = sum(math.prod(shape) * each // 8 for shape, each in constants.values())
            yield node.get_friendly_name(), Product(dims[1], dims[0], nbytes, integer=bits <= 8)


def _kind(node: Any) -> str:
    info = node.get_rt_info()
    return str(info["layerType"].astype(str)) if "layerType" in info else ""


def _bits(port: Any) -> int:
    kind = port.get_element_type()
    return 0 if kind.is_dynamic() else int(kind.bitwidth)
