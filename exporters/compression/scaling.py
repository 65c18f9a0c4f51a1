"""Activation-aware scaling (AWQ, Lin et al. 2023, arXiv 2306.00978): inputs that are large on a text are multiplied
into the weights before those are rounded, and divided out where they come from, so that their weights lose less.

Exact in itself: a norm's factors, the rows of ``up`` before ``down``, and those of ``v`` before ``o`` take the inverse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from exporters.builder import Linear
from exporters.checkpoint import Checkpoint, CheckpointView
from exporters.compression.numpy_network import Array, NumpyNetwork
from exporters.compression.rounding import Inputs, error_of, nearest
from exporters.network import build
from exporters.quantize import fitting_group
from exporters.weights import Tensor, dequantize

_EXPONENTS = tuple(float(each) for each in np.linspace(0, 1, 11))
Scales = Mapping[str, Array]
"""Of a product, by its name: (in,), what its input is divided by."""


def find_scales(
    checkpoint: Checkpoint,
    ids: NDArray[np.int64],
    group: int,
    symmetric: bool,
    progress: Callable[[int, int], None] | None = None,
) -> Scales:
    """For 4 bits, by a text; ``ids`` (windows, tokens)."""
    network = _ScalingNetwork(ids, checkpoint, group, symmetric)
    build(checkpoint, network, progress)
    return network.scales


class _ScalingNetwork(NumpyNetwork):
    def __init__(self, ids: NDArray[np.int64], checkpoint: Checkpoint, group: int, symmetric: bool) -> None:
        arch = checkpoint.architecture
        super().__init__(ids, arch.rope_switch)
        self._arch = arch
        self._group = group
        self._symmetric = symmetric
        self.scales: dict[str, Array] = {}

    def linear(self, x: Array, parts: Sequence[Linear], name: str) -> Array:
        weights = np.concatenate([dequantize(weight) for weight, _ in parts])
        group = fitting_group(weights.shape[1], self._group)
        if group is not None:
            large = np.abs(x).mean(0)
            if name.endswith(".o"):  # heads of a group share one head of values
                shape = (self._arch.num_kv_heads, -1, self._arch.head_dim)
                large = np.broadcast_to(large.reshape(shape).mean(1, keepdims=True), large.reshape(shape).shape)
                large = large.reshape(-1)
            self.scales[name] = best_scale(weights, Inputs(x).gram, large, group, self._symmetric)
        return super().linear(x, parts, name)


def best_scale(weights: Array, gram: Array, large: Array, group: int, symmetric: bool) -> Array:
    """Of powers of ``large`` (in,), the mean size of inputs, the one with which rounding to 4 bits does least to the
    product."""
    least, best = np.inf, np.ones_like(large)
    for exponent in _EXPONENTS:
        scale = np.maximum(large, 1e-6) ** np.float32(exponent)
        scale = (scale / np.sqrt(scale.max() * scale.min())).astype(np.float32)
        rounded = nearest(weights * scale, 4, group, symmetric).dequantize() / scale
        error = error_of(rounded, weights, gram)
        if error < least:
            least, best = error, scale
    return best


class ScaledCheckpoint(CheckpointView):
    """The same function as ``base``, its inputs scaled."""

    def __init__(self, base: Checkpoint, scales: Scales) -> None:
        super().__init__(base)
        self._scales = scales

    def tensor(self, name: str) -> Tensor:
        value = self._base.tensor(name)
        if not name.startswith("layers."):
            return value
        prefix, leaf = name.rsplit(".", 1) if not name.endswith(".bias") else name.removesuffix(".bias").rsplit(".", 1)
        columns, rows = self._by_column(prefix, leaf), self._by_row(prefix, leaf)
        if name.endswith(".bias") or leaf.endswith("norm"):
            return value if rows is None else (dequantize(value) / rows).astype(np.float32)
        if columns is None and rows is None:
            return value
        wide = dequantize(value)
        if columns is not None:
            wide = wide * columns
        return wide if rows is None else wide / rows[:, None]

    def _by_column(self, prefix: str, leaf: str) -> Array | None:
        product = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up", "o": "o", "down": "down"}
        return self._scales.get(f"{prefix}.{product[leaf]}") if leaf in product else None

    def _by_row(self, prefix: str, leaf: str) -> Array | None:
        """What a row's result, or a norm's, is divided by, since what takes it multiplies."""
        taker = {"attn_norm": "qkv", "mlp_norm": "gate_up", "up": "down", "v": "o"}.get(leaf)
        found = None if taker is None else self._scales.get(f"{prefix}.{taker}")
        if found is None or leaf != "v":
            return found
        arch = self.architecture  # all query heads of a head of values have the same
        return found.reshape(arch.num_kv_heads, -1, arch.head_dim)[:, 0].reshape(-1)
