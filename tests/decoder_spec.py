"""What a decoder must be told of a graph that a test has written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from devices.base import DecoderSpec, Engine
from exporters.architecture import Architecture
from exporters.export import summarize


def decoder_spec(arch: Architecture, engine: Engine, model: Path, max_context: int | None = None) -> DecoderSpec:
    """``max_context``: the model's, at most."""
    spec = summarize(arch).spec(engine, model)
    return replace(spec, max_context=min(arch.max_context, max_context or arch.max_context))
