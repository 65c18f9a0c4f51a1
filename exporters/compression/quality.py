"""What a checkpoint has lost beside the one that it was made from, in numpy, whatever the engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from exporters.checkpoint import Checkpoint
from exporters.compression.numpy_network import Array, NumpyNetwork, logits
from exporters.network import build
from exporters.weights import Tensor

_STEP = 128
"""Tokens whose logits are in memory at once."""


class Judge(Protocol):
    """As :class:`edge_runtime.evaluation.metrics.Tally`."""

    def add(self, logits: Array, following: NDArray[np.int64], reference: Array | None = None) -> None: ...

    def summary(self) -> Mapping[str, float]: ...


class _States(NumpyNetwork):
    """Keeps what the logits are made of."""

    def output(self, x: Array, table: Tensor, scale: float, softcap: float | None) -> None:
        self.states, self._table, self._scale, self._softcap = x, table, scale, softcap

    def logits(self, part: slice) -> Array:
        assert self._table is not None
        return logits(self.states[part], self._table, self._scale, self._softcap)


def compare(
    compressed: Checkpoint,
    source: Checkpoint,
    ids: NDArray[np.int64],
    judge: Judge,
    kept: NDArray[np.intp] | None = None,
) -> None:
    """Tell ``judge`` of every token of ``ids`` but the last, each given those before it.

    ``kept``: of the compressed model's tokens, in order, what they are to the source, whose other tokens are left out.
    """
    ours, theirs = _run(compressed, ids), _run(source, ids if kept is None else kept[ids])
    for start in range(0, len(ids) - 1, _STEP):
        part = slice(start, min(start + _STEP, len(ids) - 1))
        reference = theirs.logits(part)
        judge.add(
            ours.logits(part), ids[part.start + 1 : part.stop + 1], reference if kept is None else reference[:, kept]
        )


def _run(checkpoint: Checkpoint, ids: NDArray[np.int64]) -> _States:
    network = _States(ids[None], checkpoint.architecture.rope_switch)
    build(checkpoint, network)
    return network
