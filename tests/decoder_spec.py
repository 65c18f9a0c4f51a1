"""What a decoder must be told of a graph that a test has written."""

from __future__ import annotations

from pathlib import Path

from devices.base import DecoderSpec, Engine
from exporters.architecture import Architecture


def decoder_spec(arch: Architecture, engine: Engine, model: Path, max_context: int | None = None) -> DecoderSpec:
    """``max_context``: the model's, at most."""
    return DecoderSpec(
        engine=engine,
        model=model,
        num_layers=arch.num_layers,
        num_heads=arch.num_heads,
        num_kv_heads=arch.num_kv_heads,
        head_dim=arch.head_dim,
        vocab_size=arch.vocab_size,
        max_context=min(arch.max_context, max_context or arch.max_context),
        sliding_windows=tuple(layer.sliding_window for layer in arch.layers),
        rope_switch=arch.rope_switch,
    )
