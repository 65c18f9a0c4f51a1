"""Rounds a model's matrices as it runs over a text: what comes later sees what the rounding before has done."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from exporters.builder import Linear
from exporters.checkpoint import Checkpoint
from exporters.compression.numpy_network import Array, NumpyNetwork
from exporters.compression.rounding import Inputs
from exporters.compression.tensor_folder import TensorFolder
from exporters.network import build
from exporters.weights import Tensor

PARTS: Mapping[str, tuple[str, ...]] = {
    "qkv": ("q", "k", "v"),
    "gate_up": ("gate", "up"),
    "o": ("o",),
    "down": ("down",),
}
"""Of a product, by its name in the network: the tensors that have one input."""
Round = Callable[[str, Tensor, Inputs], Tensor]
"""A tensor's name, the tensor and its inputs → the tensor rounded."""


class RoundingNetwork(NumpyNetwork):
    """Keeps what it rounds in ``rounded``."""

    def __init__(self, ids: NDArray[np.int64], checkpoint: Checkpoint, round_: Round, rounded: TensorFolder) -> None:
        arch = checkpoint.architecture
        super().__init__(ids, arch.rope_switch)
        self._head = "embed" if arch.tied_head else "head"
        self._round = round_
        self._rounded = rounded

    def linear(self, x: Array, parts: Sequence[Linear], name: str) -> Array:
        inputs = Inputs(x)
        prefix, _, leaf = name.rpartition(".")
        made = []
        for part, (weight, bias) in zip(PARTS[leaf], parts, strict=True):
            rounded = self._round(f"{prefix}.{part}", weight, inputs)
            self._rounded[f"{prefix}.{part}"] = rounded
            made.append((rounded, bias))
        return super().linear(x, made, name)

    def output(self, x: Array, table: Tensor, scale: float, softcap: float | None) -> None:
        self._rounded[self._head] = self._round(self._head, table, Inputs(x))


def round_along(
    checkpoint: Checkpoint,
    ids: NDArray[np.int64],
    round_: Round,
    rounded: TensorFolder,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Round all products of ``checkpoint``, and its head, into ``rounded``. ``ids`` (windows, tokens)."""
    build(checkpoint, RoundingNetwork(ids, checkpoint, round_, rounded), progress)
