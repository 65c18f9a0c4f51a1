"""How much rounding each matrix alone moves the output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from exporters.builder import Linear
from exporters.checkpoint import Checkpoint
from exporters.compression.calibrated import PARTS
from exporters.compression.numpy_network import Array, product
from exporters.compression.streams import Streams
from exporters.network import build
from exporters.weights import Tensor

Rounded = Callable[[str, Tensor], Tensor]
"""A tensor's name and the tensor → the tensor rounded."""


def sensitivities(
    checkpoint: Checkpoint,
    ids: NDArray[np.int64],
    rounded: Rounded,
    progress: Callable[[int, int], None] | None = None,
) -> Mapping[str, float]:
    """For each matrix of the layers: the mean KL divergence of the next-token distribution, nats, when ``rounded``
    takes its place and all others stay. ``ids`` (tokens,)."""
    network = _Rounded(ids, checkpoint, rounded)
    build(checkpoint, network, progress)
    return network.found


class _Rounded(Streams):
    def __init__(self, ids: NDArray[np.int64], checkpoint: Checkpoint, rounded: Rounded) -> None:
        super().__init__(ids, checkpoint)
        self._rounded = rounded

    def changes(self, x: Array, y: Array, parts: Sequence[Linear], name: str) -> Iterator[tuple[str, Array]]:
        prefix, _, leaf = name.rpartition(".")
        start = 0
        for part, (weight, bias) in zip(PARTS[leaf], parts, strict=True):
            tensor, end = f"{prefix}.{part}", start + weight.shape[0]
            stream = y.copy()
            stream[:, start:end] = product(x, self._rounded(tensor, weight), bias)
            yield tensor, stream
            start = end
