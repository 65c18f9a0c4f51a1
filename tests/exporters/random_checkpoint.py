"""A small seeded model of any shape, in memory."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporters.architecture import Architecture, Layer, Rope
from exporters.checkpoint import CheckpointView, TextFiles
from exporters.compression.compress import Text
from exporters.hf_names import tensor_shape
from exporters.network import tensor_names
from exporters.synthetic import SyntheticCheckpoint
from exporters.weights import Tensor, dequantize

ROPE = Rope(tuple((10_000.0 ** -(np.arange(0, 16, 2) / 16)).tolist()))
ARCHITECTURE = Architecture(
    family="llama",
    vocab_size=160,
    hidden_size=64,
    intermediate_size=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_context=512,
    norm_eps=1e-5,
    layers=(Layer(ROPE),) * 8,  # the NPU plugin cannot cut a model of 2 into repeating parts
    attention_scale=16**-0.5,
)
SHORT = replace(ARCHITECTURE, layers=ARCHITECTURE.layers[:2])
MATRICES = ("q", "k", "v", "o", "gate", "up", "down", "head")
TEXT = Text("a text", "The harbour wakes before the town does. Ships leave; gulls follow them out. " * 20)


class RandomCheckpoint:
    """``quantize`` turns each matrix into the tensor the checkpoint returns."""

    def __init__(
        self, architecture: Architecture, quantize: Callable[[str, NDArray[np.float32]], Tensor] | None = None
    ) -> None:
        self._architecture = architecture
        self._quantize = quantize
        self._names = frozenset(tensor_names(architecture))

    @property
    def architecture(self) -> Architecture:
        return self._architecture

    @property
    def text(self) -> TextFiles:
        return TextFiles("{}")

    @property
    def provenance(self) -> dict[str, Any]:
        return {"source": "random"}

    def tensor(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        shape = tensor_shape(self._architecture, name)
        values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
        if len(shape) == 1:
            return values * np.float32(0.1) + np.float32(name.endswith("norm"))
        values *= np.float32((3.0 if name in ("embed", "head") else 1.0) / shape[1] ** 0.5)
        return values if self._quantize is None else self._quantize(name, values)


class Spoken(RandomCheckpoint):
    """With a tokenizer."""

    @property
    def text(self) -> TextFiles:
        return SyntheticCheckpoint("tiny").text


FRAGILE = "layers.1.gate"


class Fragile(CheckpointView):
    """The same function as ``base``, with a matrix whose every 16th input counts next to nothing and has weights beside
    which nothing is left of the others' codes."""

    def tensor(self, name: str) -> Tensor:
        value = dequantize(self._base.tensor(name)).copy()
        if name == "layers.1.mlp_norm":
            value[::16] /= 4096
        elif name in (FRAGILE, "layers.1.up"):
            value[:, ::16] *= 4096
        return value
