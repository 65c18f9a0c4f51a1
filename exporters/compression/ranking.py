"""The attention ranker, and its like for neurons and layers: what each part of a network does for its output.

Of heads and neurons the energy and the fluctuation of what they add to the stream (FLAP, An et al. 2023, arXiv
2312.11983: what only ever adds the same can be a bias); of KV groups, shares of the neurons and whole layers also how
far the output's distribution moves without them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from edge_runtime.recipe import Ranking
from exporters.builder import Linear
from exporters.checkpoint import Checkpoint
from exporters.compression.numpy_network import Array
from exporters.compression.streams import Streams
from exporters.network import build
from exporters.weights import dequantize

SHARES = (0.25, 0.5, 0.75)
"""Of a layer's neurons, without which the output is looked at."""


def rank(checkpoint: Checkpoint, ids: NDArray[np.int64], progress: Callable[[int, int], None] | None = None) -> Ranking:
    """By a text; ``ids`` (tokens,)."""
    network = _Without(ids, checkpoint)
    build(checkpoint, network, progress)
    arch, found = checkpoint.architecture, network.found
    layers = range(arch.num_layers)
    return Ranking(
        head_energy=tuple(network.energy),
        head_fluctuation=tuple(network.fluctuation),
        group_loss=tuple(tuple(found[f"{i}.group.{g}"] for g in range(arch.kv_heads(i))) for i in layers),
        neuron_loss=tuple(tuple(found[f"{i}.neurons.{share}"] for share in SHARES) for i in layers),
        layer_loss=tuple(found[f"{i}.layer"] for i in layers),
        layer_change=tuple(network.change),
    )


def neuron_importance(x: Array, down: Array) -> Array:
    """(inner,): the fluctuation of what each neuron adds. ``x`` (n, inner), ``down`` (hidden, inner)."""
    return np.asarray(x.var(0) * (down**2).sum(0))


class _Without(Streams):
    """Each change takes something out, and leaves its mean."""

    def __init__(self, ids: NDArray[np.int64], checkpoint: Checkpoint) -> None:
        super().__init__(ids, checkpoint)
        self._arch = checkpoint.architecture
        self._layer_input: Array | None = None
        self._sums = 0
        self.energy: list[tuple[float, ...]] = []
        self.fluctuation: list[tuple[float, ...]] = []
        self.change: list[float] = []

    def changes(self, x: Array, y: Array, parts: Sequence[Linear], name: str) -> Iterator[tuple[str, Array]]:
        _, index, leaf = name.split(".")
        if leaf not in ("o", "down"):
            return
        weight = dequantize(parts[0][0])
        rest = x - x.mean(0)
        if leaf == "o":
            self._rank_heads(x, rest, weight)
            width = self._arch.heads_per_group * self._arch.head_dim
            for group in range(x.shape[1] // width):
                part = slice(group * width, (group + 1) * width)
                yield f"{index}.group.{group}", y - rest[:, part] @ weight[:, part].T
            return
        order = np.argsort(neuron_importance(x, weight))
        for share in SHARES:
            least = order[: round(share * len(order))]
            yield f"{index}.neurons.{share}", y - rest[:, least] @ weight[:, least].T

    def _rank_heads(self, x: Array, rest: Array, weight: Array) -> None:
        dim = self._arch.head_dim
        parts = [slice(start, start + dim) for start in range(0, x.shape[1], dim)]
        for of, values in ((self.energy, x), (self.fluctuation, rest)):
            of.append(tuple(_mean_square(values[:, part] @ weight[:, part].T) for part in parts))

    def add(self, x: Array, y: Array) -> Array:
        """After attention, then after the MLP, whose sum is the layer's output."""
        total = super().add(x, y)
        self._sums += 1
        if self._sums % 2:
            self._layer_input = x[: self._count]
            return total
        before, after = self._layer_input, total[: self._count]
        assert before is not None
        cosine = (before * after).sum(-1) / np.sqrt((before**2).sum(-1) * (after**2).sum(-1))
        self.change.append(float(1 - cosine.mean(dtype=np.float64)))
        return self._with(total, iter([(f"{self._sums // 2 - 1}.layer", before)]))


def _mean_square(values: Array) -> float:
    return float((values**2).sum(-1).mean(dtype=np.float64))
