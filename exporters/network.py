"""The decoder network, written once for every family and every engine."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from exporters.architecture import Architecture
from exporters.builder import AttentionSpec, Builder, Linear
from exporters.checkpoint import Checkpoint
from exporters.hf_names import tensor_shape
from exporters.weights import dequantize

V = TypeVar("V")


def build(checkpoint: Checkpoint, builder: Builder[V], progress: Callable[[int, int], None] | None = None) -> None:
    """Write ``checkpoint``'s network with ``builder``; holds one layer's tensors at a time.

    ``progress(done, total)`` is called after the embedding, each layer and the head.
    """
    arch = checkpoint.architecture
    total = arch.num_layers + 2
    report = progress or (lambda done, total: None)

    x = builder.embed(checkpoint.tensor("embed"))
    x = _scaled(builder, x, arch.embedding_scale)
    report(1, total)

    normed = builder.rms_norm(x, _vector(checkpoint, "layers.0.attn_norm"), arch.norm_eps)
    for index in range(arch.num_layers):
        prefix = f"layers.{index}"
        update = _attention(checkpoint, builder, normed, index)
        x, normed = builder.add_rms_norm(x, update, _vector(checkpoint, f"{prefix}.mlp_norm"), arch.norm_eps)
        update = _mlp(checkpoint, builder, normed, prefix)
        if index + 1 < arch.num_layers:
            following = _vector(checkpoint, f"layers.{index + 1}.attn_norm")
            x, normed = builder.add_rms_norm(x, update, following, arch.norm_eps)
        else:  # rows are picked before the last norm, so the rest of the graph sees only them
            x = builder.select_rows(builder.add(x, update))
        report(index + 2, total)

    x = builder.rms_norm(x, _vector(checkpoint, "norm"), arch.norm_eps)
    head = None if arch.tied_head else checkpoint.tensor("head")
    builder.lm_head(x, head, arch.logit_scale, arch.logit_softcap)
    report(total, total)


def _attention(checkpoint: Checkpoint, builder: Builder[V], x: V, index: int) -> V:
    arch = checkpoint.architecture
    prefix = f"layers.{index}"
    qkv = [_linear(checkpoint, f"{prefix}.{name}", arch.qkv_bias) for name in ("q", "k", "v")]
    spec = AttentionSpec(
        index=index,
        layer=arch.layers[index],
        num_heads=arch.heads(index),
        num_kv_heads=arch.kv_heads(index),
        head_dim=arch.head_dim,
        scale=arch.attention_scale,
        softcap=arch.attention_softcap,
        norm_eps=arch.norm_eps,
        q_norm=_vector(checkpoint, f"{prefix}.q_norm") if arch.qk_norm else None,
        k_norm=_vector(checkpoint, f"{prefix}.k_norm") if arch.qk_norm else None,
    )
    y = builder.attention(builder.linear(x, qkv, f"{prefix}.qkv"), spec)
    y = builder.linear(y, [_linear(checkpoint, f"{prefix}.o", arch.o_bias)], f"{prefix}.o")
    return _block_output(checkpoint, builder, y, f"{prefix}.attn_post_norm")


def _mlp(checkpoint: Checkpoint, builder: Builder[V], x: V, prefix: str) -> V:
    arch = checkpoint.architecture
    gate_up = [_linear(checkpoint, f"{prefix}.{name}", arch.mlp_bias) for name in ("gate", "up")]
    y = builder.glu(builder.linear(x, gate_up, f"{prefix}.gate_up"), arch.activation)
    y = builder.linear(y, [_linear(checkpoint, f"{prefix}.down", arch.down_bias)], f"{prefix}.down")
    return _block_output(checkpoint, builder, y, f"{prefix}.mlp_post_norm")


def _block_output(checkpoint: Checkpoint, builder: Builder[V], y: V, norm: str) -> V:
    arch = checkpoint.architecture
    if arch.post_norms:
        y = builder.rms_norm(y, _vector(checkpoint, norm), arch.norm_eps)
    return _scaled(builder, y, arch.residual_scale)


def _scaled(builder: Builder[V], x: V, factor: float) -> V:
    return x if factor == 1.0 else builder.scale(x, factor)


def _linear(checkpoint: Checkpoint, name: str, bias: bool) -> Linear:
    return checkpoint.tensor(name), _vector(checkpoint, f"{name}.bias") if bias else None


def _vector(checkpoint: Checkpoint, name: str) -> NDArray[np.float32]:
    return dequantize(checkpoint.tensor(name))


def tensor_names(arch: Architecture) -> list[str]:
    """Every tensor :func:`build` reads, in order of first use."""
    names = ["embed"]
    for index in range(arch.num_layers):
        blocks = [("q", arch.qkv_bias), ("k", arch.qkv_bias), ("v", arch.qkv_bias), ("o", arch.o_bias)]
        mlp = [("gate", arch.mlp_bias), ("up", arch.mlp_bias), ("down", arch.down_bias)]
        own = ["attn_norm", *_with_bias(blocks), *(["q_norm", "k_norm"] if arch.qk_norm else [])]
        own += ["attn_post_norm"] if arch.post_norms else []
        own += ["mlp_norm", *_with_bias(mlp), *(["mlp_post_norm"] if arch.post_norms else [])]
        names += [f"layers.{index}.{name}" for name in own]
    return [*names, "norm", *([] if arch.tied_head else ["head"])]


def parameters(arch: Architecture) -> int:
    return sum(math.prod(tensor_shape(arch, name)) for name in tensor_names(arch))


def _with_bias(linears: list[tuple[str, bool]]) -> list[str]:
    return [name for base, bias in linears for name in ([base, f"{base}.bias"] if bias else [base])]
