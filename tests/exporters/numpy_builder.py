"""The builder vocabulary run at once, in float64 numpy, on one token sequence: the plain twin of every emitter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from exporters.architecture import Activation, Rope
from exporters.builder import AttentionSpec, Linear
from exporters.checkpoint import Checkpoint
from exporters.network import build
from exporters.weights import Tensor, dequantize

Array = NDArray[np.float64]


class NumpyBuilder:
    """Runs ``ids`` (n,) as it is built; ``logits`` (n, vocab) afterwards."""

    def __init__(self, ids: NDArray[np.int64], rope_switch: int | None = None) -> None:
        self._ids = ids
        self._long = rope_switch is not None and len(ids) > rope_switch
        self._table: Array | None = None
        self.logits: Array | None = None

    def embed(self, table: Tensor) -> Array:
        self._table = _wide(table)
        return self._table[self._ids]

    def linear(self, x: Array, parts: Sequence[Linear], name: str) -> Array:
        return np.concatenate(
            [x @ _wide(weight).T + (0.0 if bias is None else bias.astype(np.float64)) for weight, bias in parts], -1
        )

    def rms_norm(self, x: Array, weight: NDArray[np.float32], eps: float) -> Array:
        return np.asarray(x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight)

    def add_rms_norm(self, x: Array, y: Array, weight: NDArray[np.float32], eps: float) -> tuple[Array, Array]:
        return x + y, self.rms_norm(x + y, weight, eps)

    def add(self, x: Array, y: Array) -> Array:
        return x + y

    def scale(self, x: Array, factor: float) -> Array:
        return x * factor

    def attention(self, qkv: Array, spec: AttentionSpec) -> Array:
        count, heads, kv = len(qkv), spec.num_heads, spec.num_kv_heads
        split = qkv.reshape(count, heads + 2 * kv, spec.head_dim)
        q, k, v = split[:, :heads], split[:, heads : heads + kv], split[:, heads + kv :]
        if spec.q_norm is not None and spec.k_norm is not None:
            q, k = self.rms_norm(q, spec.q_norm, spec.norm_eps), self.rms_norm(k, spec.k_norm, spec.norm_eps)
        if spec.layer.rope is not None:
            q, k = self._rotate(q, spec.layer.rope), self._rotate(k, spec.layer.rope)
        k, v = (np.repeat(part, heads // kv, axis=1) for part in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) * spec.scale
        if spec.softcap is not None:
            scores = spec.softcap * np.tanh(scores / spec.softcap)
        back = np.arange(count)[:, None] - np.arange(count)[None, :]
        window = spec.layer.sliding_window or count
        scores = np.where((back >= 0) & (back < window), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return np.asarray(np.einsum("hqk,khd->qhd", weights, v).reshape(count, heads * spec.head_dim))

    def _rotate(self, x: Array, rope: Rope) -> Array:
        inv_freq = rope.long_inv_freq if self._long and rope.long_inv_freq else rope.inv_freq
        scale = rope.long_scale if self._long and rope.long_inv_freq else rope.scale
        angle = np.arange(len(x))[:, None, None] * np.asarray(inv_freq)
        cos, sin = np.cos(angle) * scale, np.sin(angle) * scale
        half = len(inv_freq)
        first = slice(0, 2 * half, 2) if rope.interleaved else slice(0, half)
        second = slice(1, 2 * half, 2) if rope.interleaved else slice(half, 2 * half)
        out = x.copy()
        out[..., first] = x[..., first] * cos - x[..., second] * sin
        out[..., second] = x[..., second] * cos + x[..., first] * sin
        return out

    def glu(self, gate_up: Array, activation: Activation) -> Array:
        gate, up = np.split(gate_up, 2, axis=-1)
        return ACTIVATIONS[activation](gate) * up

    def select_rows(self, x: Array) -> Array:
        return x

    def lm_head(self, x: Array, table: Tensor | None, scale: float, softcap: float | None) -> None:
        weight = self._table if table is None else _wide(table)
        assert weight is not None
        logits = x @ weight.T * scale
        self.logits = logits if softcap is None else softcap * np.tanh(logits / softcap)

    def save(self, folder: Path) -> None:
        raise NotImplementedError("runs, writes nothing")


def run(checkpoint: Checkpoint, ids: NDArray[np.int64]) -> Array:
    """Logits (n, vocab) of every position."""
    builder = NumpyBuilder(ids, checkpoint.architecture.rope_switch)
    build(checkpoint, builder)
    assert builder.logits is not None
    return builder.logits


def _wide(tensor: Tensor) -> Array:
    return dequantize(tensor).astype(np.float64)


def _silu(x: Array) -> Array:
    return np.asarray(x / (1 + np.exp(-x)))


def _gelu(x: Array) -> Array:
    return np.asarray(x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))))


def _gelu_tanh(x: Array) -> Array:
    return np.asarray(0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))


ACTIVATIONS = {"silu": _silu, "gelu": _gelu, "gelu_tanh": _gelu_tanh}
