"""What changing one thing alone does to the output: one walk through the network with a stream for each change.

A stream is the text as a model sees it that has one thing changed. Those of later changes are the plain model's until
their turn comes, and are not computed before; each layer is read once, and costs as many streams as there are by then.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from exporters.builder import Linear
from exporters.checkpoint import Checkpoint
from exporters.compression.numpy_network import Array, NumpyNetwork, logits
from exporters.weights import Tensor


class Streams(NumpyNetwork):
    """Activations (streams · tokens, width): the plain model's, then one stream for each change so far. A value with
    fewer streams than another has the plain one's in the place of those that it lacks."""

    def __init__(self, ids: NDArray[np.int64], checkpoint: Checkpoint) -> None:
        """``ids`` (tokens,)."""
        super().__init__(ids[None], checkpoint.architecture.rope_switch)
        self._count = len(ids)
        self._names: list[str] = []
        self.found: dict[str, float] = {}
        """For each change: the mean KL divergence of the next-token distribution from the plain model's, nats."""

    def changes(self, x: Array, y: Array, parts: Sequence[Linear], name: str) -> Iterator[tuple[str, Array]]:
        """Names of changes to the product ``name`` and what they make of ``y``; ``x``, ``y``: the plain stream's."""
        return iter(())

    def linear(self, x: Array, parts: Sequence[Linear], name: str) -> Array:
        y = super().linear(x, parts, name)
        return self._with(y, self.changes(x[: self._count], y[: self._count], parts, name))

    def add(self, x: Array, y: Array) -> Array:
        streams = max(len(x), len(y)) // self._count
        return self._filled(x, streams) + self._filled(y, streams)

    def add_rms_norm(self, x: Array, y: Array, weight: NDArray[np.float32], eps: float) -> tuple[Array, Array]:
        total = self.add(x, y)
        return total, self.rms_norm(total, weight, eps)

    def _with(self, value: Array, changed: Iterator[tuple[str, Array]]) -> Array:
        """``value`` and a stream for each change to it."""
        pairs = list(changed)
        if not pairs:
            return value
        streams = [self._filled(value, 1 + len(self._names)), *(stream for _, stream in pairs)]
        self._names += [name for name, _ in pairs]
        return np.concatenate(streams)

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
