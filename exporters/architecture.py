"""The arithmetic of a decoder-only transformer, as plain numbers.

One :class:`Architecture` describes every family we run; a family is a row of differences in
:mod:`exporters.families`. The network itself is written once, in :mod:`exporters.network`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal["silu", "gelu_tanh", "gelu"]


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864) of the first ``2·len(inv_freq)`` channels of a head.

    Angles are ``position · inv_freq``; cos and sin are multiplied by ``scale``. Every scaling that does not
    depend on the running length (linear, llama3, yarn) is already inside ``inv_freq`` and ``scale``.
    """

    inv_freq: tuple[float, ...]
    scale: float = 1.0
    interleaved: bool = False
    """True: pairs are channels (2i, 2i+1), as GLM; False: (i, i + rotary_dim/2), as Llama."""
    long_inv_freq: tuple[float, ...] | None = None
    """Longrope (arXiv 2402.13753): the factors of sequences longer than ``Architecture.rope_switch``."""
    long_scale: float = 1.0

    @property
    def rotary_dim(self) -> int:
        return 2 * len(self.inv_freq)


@dataclass(frozen=True)
class Layer:
    """What may differ from layer to layer."""

    rope: Rope | None
    """None: this layer sees no positions (NoPE)."""
    sliding_window: int | None = None
    """A token attends to this many newest tokens, itself included. None: to all."""
    num_kv_heads: int | None = None
    """None: as many as ``Architecture.num_kv_heads`` says. A pruned layer has fewer, each with its query heads."""
    intermediate_size: int | None = None
    """None: as ``Architecture.intermediate_size`` says."""


@dataclass(frozen=True)
class Architecture:
    """A decoder: ``embed → layers × (norm, attention, norm, gated MLP) → norm → head``."""

    family: str
    """``model_type`` of the source, e.g. ``"llama"``."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context: int
    norm_eps: float
    layers: tuple[Layer, ...]
    attention_scale: float
    """Factor on q·k, usually ``head_dim ** -0.5``."""
    activation: Activation = "silu"
    tied_head: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    """Of ``gate`` and ``up``."""
    down_bias: bool = False
    qk_norm: bool = False
    """RMS norm of each query and key head before the rotation."""
    post_norms: bool = False
    """RMS norm of the attention's and the MLP's output before the residual sum (GLM-4-0414, Gemma)."""
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    """Factor on each block's output before the residual sum (Granite)."""
    logit_scale: float = 1.0
    """Factor on the logits (Granite: 1 / logits_scaling)."""
    attention_softcap: float | None = None
    """Scores become ``c · tanh(score / c)`` before the softmax (Gemma 2)."""
    logit_softcap: float | None = None
    rope_switch: int | None = None
    """Longrope: a sequence longer than this uses ``Rope.long_inv_freq`` throughout."""

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def heads_per_group(self) -> int:
        """Query heads that share a head of keys and values."""
        return self.num_heads // self.num_kv_heads

    def kv_heads(self, layer: int) -> int:
        found = self.layers[layer].num_kv_heads
        return self.num_kv_heads if found is None else found

    def heads(self, layer: int) -> int:
        return self.kv_heads(layer) * self.heads_per_group

    def inner(self, layer: int) -> int:
        """Neurons of the layer's MLP."""
        found = self.layers[layer].intermediate_size
        return self.intermediate_size if found is None else found
