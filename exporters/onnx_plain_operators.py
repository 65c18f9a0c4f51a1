"""What ONNX graphs of standard operators alone have in common, whether their shapes are static or not.

Tokens are the first axis: activations are (tokens, …), heads of queries, keys and values (heads, tokens, head_dim).
"""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporters.architecture import Activation, Architecture, Rope
from exporters.builder import AttentionSpec
from exporters.onnx_graph import OPSET
from exporters.onnx_operators import OnnxOperators, WeightFormat
from exporters.weights import QuantizedTensor

FLOAT, FLOAT16 = 1, 10
"""Of onnx.TensorProto."""


class PlainOperators(OnnxOperators[str]):
    """Norms, gates, rotation and masks; matrices are floats."""

    _positions: str
    """The input of rows in the rotary tables; a subclass makes it."""

    def __init__(
        self,
        architecture: Architecture,
        weights: WeightFormat,
        scratch: Path | None,
        dtype: Any,
        tokens: int,
        opset: int = OPSET,
    ) -> None:
        """``tokens`` of a step; -1: any number."""
        super().__init__(architecture, weights, scratch, dtype, opset)
        self._tokens = tokens
        self._masks: dict[int | None, str] = {}
        self._angles: dict[Rope, tuple[str, str]] = {}

    # --- what there is no quantized form of ---------------------------------------------------------------------------

    def _matrix(self, tensor: QuantizedTensor, name: str) -> str:
        raise AssertionError("plain matrices are floats")

    def _embed_packed(self, matrix: str, table: QuantizedTensor) -> str:
        raise AssertionError("plain matrices are floats")

    def _packed_product(self, x: str, matrix: str, bias: str, name: str) -> str:
        raise AssertionError("plain matrices are floats")

    # --- norms and gates ----------------------------------------------------------------------------------------------

    def rms_norm(self, x: str, weight: NDArray[np.float32], eps: float) -> str:
        """In float32: squares of activations pass float16's range."""
        graph = self._graph
        wide = x if self._dtype == np.float32 else graph.one("Cast", [x], to=FLOAT)
        mean = graph.one("ReduceMean", [graph.one("Mul", [wide, wide]), graph.ints(-1)], keepdims=1)
        root = graph.one("Sqrt", [graph.one("Add", [mean, graph.scalar(eps)])])
        normed = graph.one("Div", [wide, root])
        if self._dtype != np.float32:
            normed = graph.one("Cast", [normed], to=FLOAT16)
        return graph.one("Mul", [normed, graph.constant(weight.astype(self._dtype))])

    def add_rms_norm(self, x: str, y: str, weight: NDArray[np.float32], eps: float) -> tuple[str, str]:
        total = self.add(x, y)
        return total, self.rms_norm(total, weight, eps)

    def glu(self, gate_up: str, activation: Activation) -> str:
        if activation != "silu":
            return super().glu(gate_up, activation)
        gate, up = self._halves(gate_up)
        gate = self._graph.one("Mul", [gate, self._graph.one("Sigmoid", [gate])])
        return self._graph.one("Mul", [gate, up])

    # --- attention ----------------------------------------------------------------------------------------------------

    def _by_heads(self, qkv: str, spec: AttentionSpec) -> list[str]:
        """Queries, keys and values, normed and rotated, each (its heads, tokens, head_dim)."""
        graph, dim = self._graph, spec.head_dim
        counts = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
        parts = graph.node("Split", [qkv, graph.ints(*(count * dim for count in counts))], 3, axis=-1)
        query, key, value = (
            graph.one("Reshape", [part, graph.ints(self._tokens, count, dim)])
            for part, count in zip(parts, counts, strict=True)
        )
        query = query if spec.q_norm is None else self.rms_norm(query, spec.q_norm, spec.norm_eps)
        key = key if spec.k_norm is None else self.rms_norm(key, spec.k_norm, spec.norm_eps)
        if spec.layer.rope is not None:
            query = self._rotated(query, spec.layer.rope, spec.num_heads, dim)
            key = self._rotated(key, spec.layer.rope, spec.num_kv_heads, dim)
        return [graph.one("Transpose", [x], perm=[1, 0, 2]) for x in (query, key, value)]

    @abstractmethod
    def _seen(self) -> int | str:
        """Tokens over which those of a step attend, their own included; a name where that may be any number."""

    def _mask(self, window: int | None) -> str:
        """The input (tokens, seen) that is added to the scores of layers with that window."""
        if window not in self._masks:
            name = "mask" if window is None else f"mask.{window}"
            tokens = "tokens" if self._tokens < 0 else self._tokens
            self._masks[window] = self._graph.input(name, self._dtype, [tokens, self._seen()])
        return self._masks[window]

    def _rotated(self, x: str, rope: Rope, heads: int, dim: int) -> str:
        """``x`` (tokens, heads, head_dim)."""
        graph, rotary = self._graph, 2 * len(rope.inv_freq)
        cos, sin = self._angles_of(rope)
        turned, rest = x, ""
        if rotary < dim:
            turned, rest = graph.node("Split", [x, graph.ints(rotary, dim - rotary)], 2, axis=-1)
        if rope.interleaved:
            pairs = graph.one("Reshape", [turned, graph.ints(self._tokens, heads, rotary // 2, 2)])
            halves = graph.node("Split", [pairs, graph.ints(1, 1)], 2, axis=-1)
            first, second = (
                graph.one("Reshape", [half, graph.ints(self._tokens, heads, rotary // 2)]) for half in halves
            )
        else:
            first, second = graph.node("Split", [turned, graph.ints(rotary // 2, rotary // 2)], 2, axis=-1)
        both = [
            graph.one("Sub", [graph.one("Mul", [first, cos]), graph.one("Mul", [second, sin])]),
            graph.one("Add", [graph.one("Mul", [second, cos]), graph.one("Mul", [first, sin])]),
        ]
        if rope.interleaved:
            both = [graph.one("Unsqueeze", [half, graph.ints(-1)]) for half in both]
            joined = graph.one("Concat", both, axis=-1)
            both = [graph.one("Reshape", [joined, graph.ints(self._tokens, heads, rotary)])]
        parts = both + ([rest] if rest else [])
        return parts[0] if len(parts) == 1 else graph.one("Concat", parts, axis=-1)

    def _angles_of(self, rope: Rope) -> tuple[str, str]:
        """Cosines and sines of the tokens' positions, (tokens, 1, rotary_dim / 2)."""
        if rope not in self._angles:
            graph = self._graph
            rows = (graph.one("Gather", [table, self._positions], axis=0) for table in self._rope_tables(rope))
            cos, sin = (graph.one("Unsqueeze", [row, graph.ints(1)]) for row in rows)
            self._angles[rope] = cos, sin
        return self._angles[rope]
