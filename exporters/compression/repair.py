"""Closed-form repair: what is left of a cut network is refitted, by ridge least squares, to what the whole one did.

The whole network and the cut one walk over a text side by side. Each ``o`` and ``down`` that the cut one keeps is
fitted so that its stream comes out where the whole one's does, whatever was lost before; a bias takes up means (FLAP,
arXiv 2312.11983). Fitting to the dense stream follows SlimGPT and ReplaceMe (arXiv 2505.02819).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from exporters.builder import Linear
from exporters.checkpoint import Checkpoint
from exporters.compression.cut import Cut, kept_columns
from exporters.compression.numpy_network import Array, NumpyNetwork, product
from exporters.compression.tensor_folder import TensorFolder
from exporters.network import build
from exporters.weights import dequantize

RIDGE = 0.03
"""Of the mean of the inputs' variance, added to it: pulls towards the weights as they were."""


def repair(
    checkpoint: Checkpoint,
    cut: Cut,
    ids: NDArray[np.int64],
    fitted: TensorFolder,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Refit what ``cut`` leaves of ``checkpoint`` into ``fitted``, by the names of the whole network, with the columns
    that are left. ``ids`` (windows, tokens)."""
    build(checkpoint, _SideBySide(checkpoint, cut, ids, fitted), progress)


class _SideBySide(NumpyNetwork):
    """Activations: the whole network's, then the cut one's, in which what was cut is there but not listened to."""

    def __init__(self, checkpoint: Checkpoint, cut: Cut, ids: NDArray[np.int64], fitted: TensorFolder) -> None:
        super().__init__(np.concatenate([ids, ids]), checkpoint.architecture.rope_switch)
        self._arch = checkpoint.architecture
        self._cut = cut
        self._fitted = fitted
        self._stream: Array | None = None

    def rms_norm(self, x: Array, weight: NDArray[np.float32], eps: float) -> Array:
        if self._stream is None:
            self._stream = x
        return super().rms_norm(x, weight, eps)

    def add_rms_norm(self, x: Array, y: Array, weight: NDArray[np.float32], eps: float) -> tuple[Array, Array]:
        total, normed = super().add_rms_norm(x, y, weight, eps)
        self._stream = total
        return total, normed

    def linear(self, x: Array, parts: Sequence[Linear], name: str) -> Array:
        _, index, leaf = name.split(".")
        layer = int(index)
        whole, cut = np.split(x, 2)
        if layer in self._cut.layers:
            y = super().linear(whole, parts, name)
            return np.concatenate([y, np.zeros_like(y)])
        if leaf in ("qkv", "gate_up"):
            return super().linear(x, parts, name)
        weight, bias = dequantize(parts[0][0]), parts[0][1]
        y = product(whole, weight, bias)
        kept = kept_columns(self._arch, self._cut, name)
        if self._cut.touches_before(layer, leaf):
            target = product(cut, weight, bias) if self._arch.post_norms else y + self._behind()
            weight, bias = fit(cut[:, kept], target, weight[:, kept])
            self._fitted[name], self._fitted[f"{name}.bias"] = weight, bias
            return np.concatenate([y, product(cut[:, kept], weight, bias)])
        return np.concatenate([y, product(cut, weight, bias)])

    def _behind(self) -> Array:
        """What the cut network's stream lacks, as this block's output has to make it good."""
        assert self._stream is not None
        whole, cut = np.split(self._stream, 2)
        return np.asarray((whole - cut) / np.float32(self._arch.residual_scale))


def fit(x: Array, target: Array, weight: Array) -> tuple[Array, Array]:
    """Weight (out, in) and bias (out,) with which ``x`` (n, in) comes nearest to ``target`` (n, out), by ridge least
    squares around ``weight``."""
    x_mean, target_mean = x.mean(0), target.mean(0)
    x = x - x_mean
    missing = target - target_mean - x @ weight.T
    gram = (x.T @ x).astype(np.float64)
    gram[np.diag_indices(len(gram))] += max(RIDGE * float(np.trace(gram)) / len(gram), 1e-12)
    fitted = weight + np.linalg.solve(gram, (x.T @ missing).astype(np.float64)).T.astype(np.float32)
    return fitted, np.asarray(target_mean - fitted @ x_mean, np.float32)
