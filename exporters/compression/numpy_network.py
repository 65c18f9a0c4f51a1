"""The builder vocabulary run at once, in float32 numpy, on windows of a text: what a model does with it.

:func:`exporters.network.build` then reads a layer's tensors, computes with them and lets them go.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from exporters.architecture import Activation, Rope
from exporters.builder import AttentionSpec, Linear
from exporters.weights import QuantizedTensor, Tensor, dequantize

Array = NDArray[np.float32]
"""Activations (windows · tokens, width)."""
_ROWS = 4096
"""Of a matrix that are dequantized at once."""


class NumpyNetwork:
    """Runs ``ids`` (windows, tokens). A window sees nothing of the others."""

    def __init__(self, ids: NDArray[np.int64], rope_switch: int | None = None) -> None:
        self._ids = ids
        self._long = rope_switch is not None and ids.shape[1] > rope_switch
        self._table: Tensor | None = None

    def embed(self, table: Tensor) -> Array:
        self._table = table
        ids = self._ids.reshape(-1)
        return dequantize(table.take_rows(ids) if isinstance(table, QuantizedTensor) else table[ids])

    def linear(self, x: Array, parts: Sequence[Linear], name: str) -> Array:
        return np.concatenate([product(x, weight, bias) for weight, bias in parts], -1)

    def rms_norm(self, x: Array, weight: NDArray[np.float32], eps: float) -> Array:
        return np.asarray(x / np.sqrt((x**2).mean(-1, keepdims=True) + np.float32(eps)) * weight)

    def add_rms_norm(self, x: Array, y: Array, weight: NDArray[np.float32], eps: float) -> tuple[Array, Array]:
        total = x + y
        return total, self.rms_norm(total, weight, eps)

    def add(self, x: Array, y: Array) -> Array:
        return x + y

    def scale(self, x: Array, factor: float) -> Array:
        return x * np.float32(factor)

    def attention(self, qkv: Array, spec: AttentionSpec) -> Array:
        count = self._ids.shape[1]
        split = qkv.reshape(-1, count, spec.num_heads + 2 * spec.num_kv_heads, spec.head_dim)
        return np.concatenate([self._attend(window, spec) for window in split])

    def _attend(self, window: Array, spec: AttentionSpec) -> Array:
        """(tokens, heads + 2·kv_heads, dim) → (tokens, heads · dim)."""
        count, heads, kv = len(window), spec.num_heads, spec.num_kv_heads
        q, k, v = window[:, :heads], window[:, heads : heads + kv], window[:, heads + kv :]
        if spec.q_norm is not None and spec.k_norm is not None:
            q, k = self.rms_norm(q, spec.q_norm, spec.norm_eps), self.rms_norm(k, spec.k_norm, spec.norm_eps)
        if spec.layer.rope is not None:
            q, k = self._rotate(q, spec.layer.rope), self._rotate(k, spec.layer.rope)
        grouped = q.reshape(count, kv, heads // kv, -1).transpose(1, 2, 0, 3)  # (kv, group, tokens, dim)
        scores = grouped @ k.transpose(1, 2, 0)[:, None] * np.float32(spec.scale)
        if spec.softcap is not None:
            scores = np.float32(spec.softcap) * np.tanh(scores / np.float32(spec.softcap))
        scores += _mask(count, spec.layer.sliding_window or count)
        scores -= scores.max(-1, keepdims=True)
        weights = np.exp(scores, out=scores)
        weights /= weights.sum(-1, keepdims=True)
        mixed = weights @ v.transpose(1, 0, 2)[:, None]
        return np.ascontiguousarray(mixed.transpose(2, 0, 1, 3).reshape(count, -1))

    def _rotate(self, x: Array, rope: Rope) -> Array:
        """(tokens, heads, dim), of positions from 0."""
        long = self._long and rope.long_inv_freq is not None
        inv_freq = np.asarray(rope.long_inv_freq if long else rope.inv_freq)
        angle = np.arange(len(x))[:, None, None] * inv_freq
        factor = rope.long_scale if long else rope.scale
        cos, sin = (np.asarray(part(angle) * factor, np.float32) for part in (np.cos, np.sin))
        half = len(inv_freq)
        first = slice(0, 2 * half, 2) if rope.interleaved else slice(0, half)
        second = slice(1, 2 * half, 2) if rope.interleaved else slice(half, 2 * half)
        out = x.copy()
        out[..., first] = x[..., first] * cos - x[..., second] * sin
        out[..., second] = x[..., second] * cos + x[..., first] * sin
        return out

    def glu(self, gate_up: Array, activation: Activation) -> Array:
        gate, up = np.split(gate_up, 2, axis=-1)
        return _ACTIVATIONS[activation](gate) * up

    def select_rows(self, x: Array) -> Array:
        return x

    def lm_head(self, x: Array, table: Tensor | None, scale: float, softcap: float | None) -> None:
        """What the logits are made of is :meth:`output`'s business."""
        weight = self._table if table is None else table
        assert weight is not None
        self.output(x, weight, scale, softcap)

    def output(self, x: Array, table: Tensor, scale: float, softcap: float | None) -> None:
        """The end, with the states before the head."""

    def save(self, folder: Path) -> None:
        raise NotImplementedError("it runs, and writes nothing")


@lru_cache(maxsize=2)
def _mask(count: int, window: int) -> Array:
    """(tokens, tokens): 0 for what a token attends to, -inf for the rest."""
    back = np.arange(count)[:, None] - np.arange(count)[None, :]
    return np.where((back >= 0) & (back < window), np.float32(0), np.float32(-np.inf))


def product(x: Array, weight: Tensor, bias: NDArray[np.float32] | None = None) -> Array:
    """``x`` (n, in) times ``weight`` (out, in), of which some rows at a time are float32."""
    rows = weight.shape[0]
    out = np.empty((len(x), rows), np.float32)
    for start in range(0, rows, _ROWS):
        part = slice(start, start + _ROWS)
        values = dequantize(weight.take_rows(part) if isinstance(weight, QuantizedTensor) else weight[part])
        np.matmul(x, values.T, out=out[:, part])
    return out if bias is None else out + bias


def logits(x: Array, table: Tensor, scale: float, softcap: float | None) -> Array:
    """(n, vocab)."""
    values = product(x, table) * np.float32(scale)
    return values if softcap is None else np.float32(softcap) * np.tanh(values / np.float32(softcap))


def _silu(x: Array) -> Array:
    with np.errstate(over="ignore"):  # exp(88) of a value that becomes 0
        return np.asarray(x / (1 + np.exp(-x)))


def _gelu(x: Array) -> Array:
    """With erf by Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26: within 1.5e-7."""
    z = np.abs(x) / np.float32(math.sqrt(2))
    t = 1 / (1 + np.float32(0.3275911) * z)
    tail: Array = np.full(t.shape, 1.061405429, np.float32)
    for factor in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        tail = np.asarray(tail * t + np.float32(factor))
    erf = np.copysign(1 - tail * t * np.exp(-z * z), x)
    return np.asarray(x * np.float32(0.5) * (1 + erf))


def _gelu_tanh(x: Array) -> Array:
    inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x**3)
    return np.asarray(np.float32(0.5) * x * (1 + np.tanh(inner)))


_ACTIVATIONS: Mapping[Activation, Callable[[Array], Array]] = {"silu": _silu, "gelu": _gelu, "gelu_tanh": _gelu_tanh}
