"""How much rounding each matrix alone moves the output: one walk through the network with a stream for each of them.

A stream is the text as a model sees it that has one matrix rounded. Those of later matrices are the plain model's until
their turn comes, and are not computed before; each layer is read once, and costs as many streams as there are by then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from exporters.builder import Linear
from exporters.checkpoint import Checkpoint
from exporters.compression.calibrated import PARTS
from exporters.compression.numpy_network import Array, NumpyNetwork, logits, product
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
    network = _Streams(ids, checkpoint, rounded)
    build(checkpoint, network, progress)
    return network.found


class _Streams(NumpyNetwork):
    """Activations (streams · tokens, width): the plain model's, then one stream for each matrix so far. A value with
    fewer streams than another has the plain one's in the place of those that it lacks."""

    def __init__(self, ids: NDArray[np.int64], checkpoint: Checkpoint, rounded: Rounded) -> None:
        super().__init__(ids[None], checkpoint.architecture.rope_switch)
        self._count = len(ids)
        self._rounded = rounded
        self._names: list[str] = []
        self.found: dict[str, float] = {}

    def linear(self, x: Array, parts: Sequence[Linear], name: str) -> Array:
        y = super().linear(x, parts, name)
        prefix, _, leaf = name.rpartition(".")
        plain_in, plain_out = x[: self._count], y[: self._count]
        streams, start = [self._filled(y, 1 + len(self._names))], 0
        for part, (weight, bias) in zip(PARTS[leaf], parts, strict=True):
            tensor, end = f"{prefix}.{part}", start + weight.shape[0]
            stream = plain_out.copy()
            stream[:, start:end] = product(plain_in, self._rounded(tensor, weight), bias)
            streams.append(stream)
            self._names.append(tensor)
            start = end
        return np.concatenate(streams)

    def add(self, x: Array, y: Array) -> Array:
        streams = max(len(x), len(y)) // self._count
        return self._filled(x, streams) + self._filled(y, streams)

    def add_rms_norm(self, x: Array, y: Array, weight: NDArray[np.float32], eps: float) -> tuple[Array, Array]:
        total = self.add(x, y)
        return total, self.rms_norm(total, weight, eps)

    def _filled(self, x: Array, streams: int) -> Array:
        missing = streams - len(x) // self._count
        return x if missing <= 0 else np.concatenate([x, np.tile(x[: self._count], (missing, 1))])

    def output(self, x: Array, table: Tensor, scale: float, softcap: float | None) -> None:
        plain, *streams = np.split(x, len(x) // self._count)
        reference = _log_softmax(logits(plain, table, scale, softcap))
        weights = np.exp(reference)
        for name, stream in zip(self._names, streams, strict=True):
            own = _log_softmax(logits(stream, table, scale, softcap))
            own -= reference
            own *= weights
            self.found[name] = float(-own.sum(dtype=np.float64) / self._count)


def _log_softmax(values: Array) -> Array:
    values = values - values.max(-1, keepdims=True)
    values -= np.log(np.exp(values).sum(-1, keepdims=True))
    return values
