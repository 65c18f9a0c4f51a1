"""The operators that every ONNX graph of ours shares, over a 16- or 32-bit float type."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeGuard, TypeVar

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import UnsupportedModel
from exporters.architecture import Activation, Architecture, Rope
from exporters.builder import AttentionSpec, Levels, Linear
from exporters.onnx_graph import MICROSOFT, OPSET, OnnxGraph
from exporters.weights import QuantizedTensor, Tensor, concat_rows, dequantize, is_half

WeightFormat = Literal["fp32", "fp16", "int8", "int4"]
Matrix = TypeVar("Matrix")
"""What a builder must know of a quantized matrix that is in the graph."""
_FLOAT = 1  # onnx.TensorProto.FLOAT
_WIDE_RANGE = ("gemma",)


def passes_float16(architecture: Architecture) -> bool:
    """Whether activations of the family pass float16's largest number (65504)."""
    return architecture.family.startswith(_WIDE_RANGE)


class OnnxOperators(ABC, Generic[Matrix]):
    """Norms, sums, gates, rotary tables and float matrices; how quantized ones are stored and attention is done is a
    subclass's business."""

    levels: ClassVar[Levels] = (4, 8)
    """ONNX Runtime's CPU provider makes float32 of a float16 matrix, in twice the memory, as it loads it."""
    _ids: str
    """The input of token ids; a subclass makes it."""
    _row_index: str
    """The input that says which tokens get logits; a subclass makes it."""

    def __init__(
        self, architecture: Architecture, weights: WeightFormat, scratch: Path | None, dtype: Any, opset: int = OPSET
    ) -> None:
        """``dtype``: numpy's name for the type of activations, norms and tables, and of float matrices unless
        ``weights`` asks for a narrower one. ``scratch``, ``opset``: see OnnxGraph."""
        self._widths: dict[str, int] = {}
        """Of products, by the names of their values."""
        self._arch = architecture
        self._weights = weights
        self._dtype = np.dtype(dtype)
        self._stored_dtype = np.dtype(np.float16) if weights == "fp16" and self._dtype == np.float32 else self._dtype
        self._embedding: str | Matrix | None = None
        self._graph = OnnxGraph(architecture.family, scratch, opset)
        self._ropes: dict[Rope, tuple[str, str]] = {}
        self._residuals = 0

    @abstractmethod
    def _matrix(self, tensor: QuantizedTensor, name: str) -> Matrix:
        """Write ``tensor``. UnsupportedModel, with ``name``, if the engine has no such matrix."""

    @abstractmethod
    def _embed_packed(self, matrix: Matrix, table: QuantizedTensor) -> str:
        """Rows of ``matrix``, which holds ``table``, for the input ids."""

    @abstractmethod
    def _packed_product(self, x: str, matrix: Matrix, bias: str, name: str) -> str:
        """``x`` times ``matrix``, transposed. ``bias``: a weight's name, or "" for none."""

    def _packed_head(self, x: str, matrix: Matrix) -> str:
        return self._packed_product(x, matrix, "", "head")

    def embed(self, table: Tensor) -> str:
        if self._kept_quantized(table):
            matrix = self._matrix(table, "embed")
            self._embedding = matrix
            return self._embed_packed(matrix, table)
        rows = self._graph.weight("embed.weight", self._stored(dequantize(table)))
        self._embedding = rows
        return self._widened(self._graph.one("Gather", [rows, self._ids], axis=0))

    def _kept_quantized(self, tensor: Tensor) -> TypeGuard[QuantizedTensor]:
        return isinstance(tensor, QuantizedTensor) and self._weights in ("int8", "int4")

    def linear(self, x: str, parts: Sequence[Linear], name: str) -> str:
        weights = [weight for weight, _ in parts]
        biases = [bias for _, bias in parts]
        bias = None
        if any(b is not None for b in biases):
            zeros = (np.zeros(w.shape[0], np.float32) for w in weights)
            bias = np.concatenate([zero if b is None else b for zero, b in zip(zeros, biases, strict=True)])
        if self._weights in ("fp32", "fp16"):
            weights = [dequantize(weight) for weight in weights]

        outputs, start = [], 0
        for index, weight in enumerate(concat_rows(weights)):
            own = None if bias is None else bias[start : start + weight.shape[0]]
            outputs.append(self._product(x, weight, own, f"{name}.{index}"))
            start += weight.shape[0]
        joined = outputs[0] if len(outputs) == 1 else self._graph.one("Concat", outputs, axis=-1)
        self._widths[joined] = start
        return joined

    def _product(self, x: str, weight: Tensor, bias: NDArray[np.float32] | None, name: str) -> str:
        """``x`` times one matrix (out, in), transposed."""
        graph = self._graph
        bias_name = "" if bias is None else graph.weight(f"{name}.bias", bias.astype(self._dtype))
        if isinstance(weight, QuantizedTensor):
            return self._packed_product(x, self._matrix(weight, name), bias_name, name)
        if is_half(weight):
            return self._half_product(x, weight, bias_name, name)
        return self._float_product(x, dequantize(weight), bias_name, name)

    def _half_product(self, x: str, weight: NDArray[np.float16], bias: str, name: str) -> str:
        """``x`` times a matrix that a recipe keeps in float16: where the engine has nothing of its own for it, one of
        floats as any other."""
        return self._float_product(x, dequantize(weight), bias, name)

    def _float_product(self, x: str, weight: NDArray[np.float32], bias: str, name: str) -> str:
        stored = self._graph.weight(f"{name}.weight", self._stored(weight.T))
        y = self._graph.one("MatMul", [x, self._widened(stored)])
        return self._graph.one("Add", [y, bias]) if bias else y

    def _stored(self, weight: NDArray[np.float32]) -> NDArray[np.generic]:
        if self._stored_dtype == weight.dtype:
            return weight
        with np.errstate(over="ignore"):  # refused below, by name
            stored = weight.astype(self._stored_dtype)
        if not np.isfinite(stored).all():
            largest, limit = float(np.abs(weight).max()), float(ml_dtypes.finfo(self._stored_dtype).max)
            raise UnsupportedModel(
                f"a weight of {largest:g} is over {self._stored_dtype}'s range ({limit:g}); "
                "export it for the CPU, as fp32 or int8"
            )
        return stored

    def _widened(self, value: str) -> str:
        """A weight, or rows of it, in the type of activations; ONNX Runtime widens constants once, as it loads them."""
        return value if self._stored_dtype == self._dtype else self._graph.one("Cast", [value], to=_FLOAT)

    def rms_norm(self, x: str, weight: NDArray[np.float32], eps: float) -> str:
        gamma = self._graph.constant(weight.astype(self._dtype))
        return self._graph.one("SimplifiedLayerNormalization", [x, gamma], axis=-1, epsilon=eps, stash_type=1)

    def add_rms_norm(self, x: str, y: str, weight: NDArray[np.float32], eps: float) -> tuple[str, str]:
        name = f"residual_{self._residuals}"
        self._residuals += 1
        normed, total = f"{name}.norm", f"{name}.sum"
        inputs = [x, y, self._graph.constant(weight.astype(self._dtype))]
        outputs = [normed, "", "", total]  # the two in between are statistics for training
        self._graph.node("SkipSimplifiedLayerNormalization", inputs, outputs, MICROSOFT, epsilon=eps)
        return total, normed

    def add(self, x: str, y: str) -> str:
        return self._graph.one("Add", [x, y])

    def scale(self, x: str, factor: float) -> str:
        return self._scale(x, factor, self._dtype)

    def _scale(self, x: str, factor: float, dtype: Any) -> str:
        return self._graph.one("Mul", [x, self._graph.constant(np.array(factor, dtype))])

    def glu(self, gate_up: str, activation: Activation) -> str:
        graph = self._graph
        gate, up = self._halves(gate_up)
        if activation == "silu":
            gate = graph.one("QuickGelu", [gate], MICROSOFT, alpha=1.0)  # x · sigmoid(alpha · x)
        else:
            gate = graph.one("Gelu", [gate], approximate="tanh" if activation == "gelu_tanh" else "none")
        return graph.one("Mul", [gate, up])

    def _halves(self, gate_up: str) -> tuple[str, str]:
        half = self._widths[gate_up] // 2  # by sizes, since CoreML takes no Split by number
        gate, up = self._graph.node("Split", [gate_up, self._graph.ints(half, half)], 2, axis=-1)
        return gate, up

    def select_rows(self, x: str) -> str:
        return self._graph.one("Gather", [x, self._row_index], axis=0)

    def lm_head(self, x: str, table: Tensor | None, scale: float, softcap: float | None) -> None:
        graph = self._graph
        y = self._head(x, table)
        if self._dtype != np.float32:
            y = graph.one("Cast", [y], to=_FLOAT)
        if scale != 1.0:
            y = self._scale(y, scale, np.float32)
        if softcap is not None:
            y = self._softcap(y, softcap, np.float32)
        graph.node("Identity", [y], ["logits"])
        graph.output("logits", np.float32, ["rows", self._arch.vocab_size])

    def _head(self, x: str, table: Tensor | None) -> str:
        """``x`` times the head, in the type of activations."""
        if table is not None:
            if self._kept_quantized(table):
                return self._packed_head(x, self._matrix(table, "head"))
            return self.linear(x, [(table, None)], "head")
        if self._embedding is None:
            raise ValueError("a tied head needs embed() first")
        if isinstance(self._embedding, str):
            return self._graph.one("Gemm", [x, self._widened(self._embedding)], transB=1)
        return self._packed_head(x, self._embedding)

    def _softcap(self, y: str, cap: float, dtype: Any) -> str:
        return self._scale(self._graph.one("Tanh", [self._scale(y, 1 / cap, dtype)]), cap, dtype)

    def _positions_held(self) -> int:
        """Rows of a rotary table."""
        return self._arch.max_context

    def _rope_tables(self, rope: Rope) -> tuple[str, str]:
        """(rows, rotary_dim / 2) cosines and sines, one pair for each distinct rope.

        A model with a rope switch has its short table's rows first and the long table's after them: the caller adds
        their number to the positions of a long sequence.
        """
        if rope not in self._ropes:
            tables = [(rope.inv_freq, rope.scale)]
            if self._arch.rope_switch is not None:
                tables.append(
                    (rope.long_inv_freq or rope.inv_freq, rope.long_scale if rope.long_inv_freq else rope.scale)
                )
            positions = np.arange(self._positions_held(), dtype=np.float64)
            angles = [np.outer(positions, np.array(frequencies)) for frequencies, _ in tables]
            scales = [scale for _, scale in tables]
            name = f"rope.{len(self._ropes)}"
            cos = np.concatenate([np.cos(a) * s for a, s in zip(angles, scales, strict=True)]).astype(self._dtype)
            sin = np.concatenate([np.sin(a) * s for a, s in zip(angles, scales, strict=True)]).astype(self._dtype)
            self._ropes[rope] = self._graph.weight(f"{name}.cos", cos), self._graph.weight(f"{name}.sin", sin)
        return self._ropes[rope]

    def _attention_attributes(self, spec: AttentionSpec) -> dict[str, Any]:
        """Those that Microsoft's attention operators have alike."""
        return {
            "num_heads": spec.num_heads,
            "kv_num_heads": spec.num_kv_heads,
            "scale": spec.scale,
            "softcap": spec.softcap or 0.0,
            "local_window_size": -1 if spec.layer.sliding_window is None else spec.layer.sliding_window,
        }

    def save(self, folder: Path) -> None:
        """Write ``model.onnx`` and ``model.onnx.data``. StorageError if ``folder`` cannot be written."""
        self._graph.save(folder, "edge-glm", self._metadata())

    def _metadata(self) -> dict[str, str]:
        return {"family": self._arch.family, "weights": self._weights}
