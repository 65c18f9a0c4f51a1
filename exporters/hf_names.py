"""Canonical tensor names, their shapes, and where Transformers' checkpoints keep them."""

from __future__ import annotations

from dataclasses import dataclass

from exporters.architecture import Architecture
from exporters.families import family_of

_LLAMA = {
    "attn_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "o": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_OUTER = {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}
_FUSED = (("q", "k", "v"), ("gate", "up"))
"""Leaves that a checkpoint may stack into one tensor, in stacking order."""


@dataclass(frozen=True)
class Source:
    """Where a canonical tensor lies: rows [start, stop) of the tensor ``name``, which has ``shape`` as a whole."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    offset: float = 0.0
    """Added to every value (Gemma's norms)."""


def tensor_shape(arch: Architecture, name: str) -> tuple[int, ...]:
    """Shape of a canonical tensor (see :class:`exporters.checkpoint.Checkpoint`). KeyError for an unknown name."""
    _, index, leaf = name.split(".", 2) if name.startswith("layers.") else ("", "0", name)
    layer, hidden = int(index), arch.hidden_size
    q_size, kv_size = arch.heads(layer) * arch.head_dim, arch.kv_heads(layer) * arch.head_dim
    inner = arch.inner(layer)
    matrices = {
        "embed": (arch.vocab_size, hidden),
        "head": (arch.vocab_size, hidden),
        "q": (q_size, hidden),
        "k": (kv_size, hidden),
        "v": (kv_size, hidden),
        "o": (hidden, q_size),
        "gate": (inner, hidden),
        "up": (inner, hidden),
        "down": (hidden, inner),
    }
    if leaf in matrices:
        return matrices[leaf]
    if leaf.endswith(".bias"):
        return matrices[leaf.removesuffix(".bias")][:1]
    heads = {"q_norm": arch.head_dim, "k_norm": arch.head_dim}
    norms = dict.fromkeys(("norm", "attn_norm", "mlp_norm", "attn_post_norm", "mlp_post_norm"), hidden)
    return ({**norms, **heads}[leaf],)


def source(arch: Architecture, name: str) -> Source:
    """Where ``name`` lies in a checkpoint saved by Transformers. KeyError for an unknown name."""
    family = family_of(arch.family)
    shape = tensor_shape(arch, name)
    is_norm = name.endswith("norm")
    offset = family.norm_offset if is_norm else 0.0
    if name in _OUTER:
        return Source(_OUTER[name], shape, 0, shape[0], offset)
    _, index, leaf = name.split(".", 2)
    base, dot, suffix = leaf.partition(".")
    names = {**_LLAMA, **family.tensors}
    path = f"model.layers.{index}.{names[base]}.{suffix or 'weight'}"

    group = next((group for group in _FUSED if base in group and len({names[part] for part in group}) == 1), (base,))
    sizes = [tensor_shape(arch, f"layers.{index}.{part}{dot}{suffix}")[0] for part in group]
    start = sum(sizes[: group.index(base)])
    return Source(path, (sum(sizes), *shape[1:]), start, start + shape[0], offset)
