"""How much rounding each matrix alone moves the output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from exporters.builder import Linear
from exporters.checkpoint import Checkpoint
from exporters.compression.budget import NARROW, Precision, stored_bits
from exporters.compression.calibrated import PARTS
from exporters.compression.numpy_network import Array, product
from exporters.compression.streams import Streams
from exporters.network import build
from exporters.weights import Tensor

Candidates = Callable[[str, Tensor], Mapping[int, Tensor]]
"""A tensor's name and the tensor → what it may become, by level; among them :data:`NARROW`."""


def sensitivities(
    checkpoint: Checkpoint,
    ids: NDArray[np.int64],
    candidates: Candidates,
    progress: Callable[[int, int], None] | None = None,
) -> Mapping[str, Sequence[Precision]]:
    """For each matrix of the layers its options; ``ids`` (tokens,).

    The loss of the narrowest is measured: the mean KL divergence of the next-token distribution when it takes the
    matrix's place and all others stay. It grows with the square of what is done to a product, as any distance near its
    minimum, so that of the others is that loss by the ratio of their errors in the product.
    """
    network = _Rounded(ids, checkpoint, candidates)
    build(checkpoint, network, progress)
    return {name: _options(network.found[name], tried) for name, tried in network.tried.items()}


def _options(loss: float, tried: Mapping[int, tuple[float, float]]) -> list[Precision]:
    """``tried``: bits of a weight and error, by level."""
    narrow = tried[NARROW][1]
    return [Precision(level, bits, loss * error / narrow if narrow else 0.0) for level, (bits, error) in tried.items()]


class _Rounded(Streams):
    def __init__(self, ids: NDArray[np.int64], checkpoint: Checkpoint, candidates: Candidates) -> None:
        super().__init__(ids, checkpoint)
        self._candidates = candidates
        self.tried: dict[str, dict[int, tuple[float, float]]] = {}
        """Of each matrix by level: bits of a weight, and the mean square of the error in the product."""

    def changes(self, x: Array, y: Array, parts: Sequence[Linear], name: str) -> Iterator[tuple[str, Array]]:
        prefix, _, leaf = name.rpartition(".")
        start = 0
        for part, (weight, bias) in zip(PARTS[leaf], parts, strict=True):
            tensor, end = f"{prefix}.{part}", start + weight.shape[0]
            plain = y[:, start:end]
            self.tried[tensor] = {}
            for level, rounded in self._candidates(tensor, weight).items():
                changed = product(x, rounded, bias)
                error = float(np.square(changed - plain, dtype=np.float64).mean())
                self.tried[tensor][level] = stored_bits(rounded), error
                if level == NARROW:
                    stream = y.copy()
                    stream[:, start:end] = changed
                    yield tensor, stream
            start = end
