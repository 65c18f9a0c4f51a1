"""The operators that every ONNX graph of ours shares, over a 16- or 32-bit float type."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from exporters.architecture import Activation, Architecture, Rope
from exporters.builder import Linear
from exporters.onnx_graph import MICROSOFT, OnnxGraph
from exporters.weights import Tensor, concat_rows, dequantize

WeightFormat = Literal["fp32", "fp16", "int8", "int4"]


class OnnxOperators(ABC):
    """Norms, sums, gates and rotary tables; how matrices are stored and attention is done is a subclass's business."""

    def __init__(self, architecture: Architecture, weights: WeightFormat, scratch: Path | None, dtype: Any) -> None:
        """``dtype``: numpy's name for the type of activations, norms and tables."""
        self._arch = architecture
        self._weights = weights
        self._dtype = np.dtype(dtype)
        self._graph = OnnxGraph(architecture.family, scratch)
        self._ropes: dict[Rope, tuple[str, str]] = {}
        self._residuals = 0

    @abstractmethod
    def _product(self, x: str, weight: Tensor, bias: NDArray[np.float32] | None, name: str) -> str:
        """``x`` times one matrix (out, in), transposed."""

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
        return outputs[0] if len(outputs) == 1 else self._graph.one("Concat", outputs, axis=-1)

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
        half = self._arch.intermediate_size
        gate, up = graph.node("Split", [gate_up, graph.ints(half, half)], 2, axis=-1)
        if activation == "silu":
            gate = graph.one("QuickGelu", [gate], MICROSOFT, alpha=1.0)  # x · sigmoid(alpha · x)
        else:
            gate = graph.one("Gelu", [gate], approximate="tanh" if activation == "gelu_tanh" else "none")
        return graph.one("Mul", [gate, up])

    def _softcap(self, y: str, cap: float, dtype: Any) -> str:
        return self._scale(self._graph.one("Tanh", [self._scale(y, 1 / cap, dtype)]), cap, dtype)

    def _rope_tables(self, rope: Rope) -> tuple[str, str]:
        """(rows, rotary_dim / 2) cosines and sines, one pair for each distinct rope.

        A model with a rope switch has its short table's rows first and the long table's after them: the caller adds
        ``max_context`` to the positions of a long sequence.
        """
        if rope not in self._ropes:
            tables = [(rope.inv_freq, rope.scale)]
            if self._arch.rope_switch is not None:
                tables.append(
                    (rope.long_inv_freq or rope.inv_freq, rope.long_scale if rope.long_inv_freq else rope.scale)
                )
            positions = np.arange(self._arch.max_context, dtype=np.float64)
            angles = [np.outer(positions, np.array(frequencies)) for frequencies, _ in tables]
            scales = [scale for _, scale in tables]
            name = f"rope.{len(self._ropes)}"
            cos = np.concatenate([np.cos(a) * s for a, s in zip(angles, scales, strict=True)]).astype(self._dtype)
            sin = np.concatenate([np.sin(a) * s for a, s in zip(angles, scales, strict=True)]).astype(self._dtype)
            self._ropes[rope] = self._graph.weight(f"{name}.cos", cos), self._graph.weight(f"{name}.sin", sin)
        return self._ropes[rope]

    def save(self, folder: Path) -> None:
        """Write ``model.onnx`` and ``model.onnx.data``. StorageError if ``folder`` cannot be written."""
        self._graph.save(folder, "edge-glm", {"family": self._arch.family, "weights": self._weights})
