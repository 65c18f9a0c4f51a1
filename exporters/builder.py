"""The vocabulary in which the network is written. One builder per engine turns it into a graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from exporters.architecture import Activation, Layer
from exporters.weights import Tensor

Value = TypeVar("Value")
"""A builder's handle on an activation. Token dimensions are the builder's business; the last axis is written here."""


@dataclass(frozen=True)
class AttentionSpec:
    """One layer's attention, without its projections."""

    index: int
    """Layer number; names the KV cache."""
    layer: Layer
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    softcap: float | None = None
    norm_eps: float = 0.0
    q_norm: NDArray[np.float32] | None = None
    """(head_dim,): RMS norm of each head before the rotation."""
    k_norm: NDArray[np.float32] | None = None


Linear = tuple[Tensor, NDArray[np.float32] | None]
"""A weight (out, in) and its bias (out,) or None."""


Levels = tuple[int, ...]
"""Bits that a graph's matrices may have side by side, of 4, 8 and 16 (float16): those that its engine keeps as small as
they are, and multiplies as fast as their size lets it."""


class Builder(Protocol[Value]):
    """Each call adds operators to the graph. Weights are written out as they come, never gathered in memory."""

    def embed(self, table: Tensor) -> Value:
        """Rows of (vocab, hidden) for the input ids."""

    def linear(self, x: Value, parts: Sequence[Linear], name: str) -> Value:
        """Products of ``x`` (…, in) with each (weight (out_i, in), bias), joined on the last axis."""

    def rms_norm(self, x: Value, weight: NDArray[np.float32], eps: float) -> Value:
        """Root-mean-square norm over the last axis (arXiv 1910.07467)."""

    def add_rms_norm(self, x: Value, y: Value, weight: NDArray[np.float32], eps: float) -> tuple[Value, Value]:
        """``s = x + y`` and its norm: (s, rms_norm(s))."""

    def add(self, x: Value, y: Value) -> Value: ...

    def scale(self, x: Value, factor: float) -> Value: ...

    def attention(self, qkv: Value, spec: AttentionSpec) -> Value:
        """Head norms, rotation, cache append and causal attention.

        ``qkv`` is (…, (heads + 2·kv_heads)·head_dim): queries, keys, values; returns (…, heads·head_dim).
        """

    def glu(self, gate_up: Value, activation: Activation) -> Value:
        """``activation(first half) · second half`` of the last axis."""

    def select_rows(self, x: Value) -> Value:
        """Only the tokens whose logits are asked for: (rows, hidden)."""

    def lm_head(self, x: Value, table: Tensor | None, scale: float, softcap: float | None) -> None:
        """Make the graph's output: float32 logits (rows, vocab). ``table`` None: the embedding's (tied)."""

    def save(self, folder: Path) -> None:
        """Finish the files in ``folder``."""
