"""A GGUF file as a :class:`~exporters.checkpoint.Checkpoint`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import CorruptModel, UnsupportedModel
from exporters.architecture import Architecture
from exporters.checkpoint import TextFiles
from exporters.gguf_blocks import decode, supported
from exporters.gguf_file import GgufFile, TensorInfo, open_gguf
from exporters.gguf_metadata import family_of, read_architecture
from exporters.gguf_tokenizer import named_templates, read_text
from exporters.hf_names import tensor_shape
from exporters.network import tensor_names
from exporters.weights import QuantizedTensor, Tensor, dequantize

_OUTER = {"embed": "token_embd.weight", "norm": "output_norm.weight", "head": "output.weight"}
_LEAVES = {
    "attn_norm": "attn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "o": "attn_output",
    "attn_post_norm": "post_attention_norm",
    "mlp_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
    "mlp_post_norm": "post_ffw_norm",
}
_FUSED = {"attn_qkv": ("q", "k", "v"), "ffn_up": ("gate", "up")}
"""A stacked tensor and its parts in order. ``ffn_up`` holds both halves where there is no ``ffn_gate``."""
_NO_WEIGHTS = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})
"""Tensors that are part of the architecture."""


@dataclass(frozen=True)
class _Source:
    """Rows [start, stop) of a tensor of the file."""

    info: TensorInfo
    start: int
    stop: int


class GgufCheckpoint:
    """Reads a ``.gguf`` file of a supported family.

    Opening reads the header and checks that every tensor of the architecture is there with its shape and a format
    that is read, and none besides. Raises CorruptModel, UnsupportedModel, ModelNotFound or StorageError.
    """

    def __init__(self, path: Path) -> None:
        self._file: GgufFile = open_gguf(path)
        self._permuted = family_of(self._file.metadata).permuted
        self._architecture = read_architecture(self._file)
        self._sources = _sources(self._architecture, self._file)
        self._text = read_text(self._file.metadata, self._architecture.vocab_size, path.name)

    @property
    def architecture(self) -> Architecture:
        return self._architecture

    @property
    def text(self) -> TextFiles:
        return self._text

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """``source``, ``format``, ``sha256``, and ``name``, ``licence`` and other chat templates if the file says."""
        metadata = self._file.metadata
        with self._file.path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        kinds = sorted({source.info.kind.name for source in self._sources.values()})
        made = {"source": self._file.path.name, "format": "gguf", "sha256": digest, "tensor_types": kinds}
        named = {"name": metadata.get("general.name"), "licence": metadata.get("general.license")}
        made |= {key: value for key, value in named.items() if isinstance(value, str)}
        if templates := named_templates(metadata):
            made["other_chat_templates"] = templates
        return made

    def kind(self, name: str) -> str:
        """The format that the file has a tensor in, as GGML calls it."""
        return str(self._sources[name].info.kind.name)

    def tensor(self, name: str) -> Tensor:
        source = self._sources[name]
        if len(source.info.shape) == 1:  # one row, of which `start` and `stop` are elements
            values = dequantize(decode(self._file.rows(source.info, 0, 1), source.info.kind, source.info.name))
            return self._in_order(name, values[0, source.start : source.stop])
        raw = self._file.rows(source.info, source.start, source.stop)
        return self._in_order(name, decode(raw, source.info.kind, source.info.name))

    def _in_order(self, name: str, tensor: Tensor) -> Tensor:
        """Undo the converter's permutation of Q and K (``LlamaModel.permute``)."""
        leaf = name.split(".")[2] if name.startswith("layers.") else ""
        if not self._permuted or leaf not in ("q", "k"):
            return tensor
        arch = self._architecture
        order = rotated_order(arch.num_heads if leaf == "q" else arch.num_kv_heads, arch.head_dim)
        return tensor.take_rows(order) if isinstance(tensor, QuantizedTensor) else tensor[order]


def rotated_order(heads: int, head_dim: int) -> NDArray[np.intp]:
    """(heads · head_dim,): for each row in Transformers' order, its place among rows in pairs (2i, 2i+1)."""
    return np.arange(heads * head_dim).reshape(heads, head_dim // 2, 2).swapaxes(1, 2).reshape(-1)


def _sources(arch: Architecture, file: GgufFile) -> Mapping[str, _Source]:
    """Where each canonical tensor lies."""
    sources = {name: _source(arch, file, name) for name in tensor_names(arch)}
    used = {source.info.name for source in sources.values()} | _NO_WEIGHTS
    if unknown := sorted(set(file.tensors) - used):
        raise UnsupportedModel(
            f"{file.path.name}: {len(unknown)} tensors have no place in a {arch.family} model with this metadata, "
            f"the first is {unknown[0]!r}; they may change the arithmetic, so the model is not run without knowing them"
        )
    return sources


def _source(arch: Architecture, file: GgufFile, name: str) -> _Source:
    shape = tensor_shape(arch, name)
    if name in _OUTER:
        return _Source(_checked(file, _OUTER[name], shape), 0, shape[0])
    _, index, leaf = name.split(".", 2)
    base, _, suffix = leaf.partition(".")
    suffix = suffix or "weight"
    for stacked, parts in _FUSED.items():
        stored = f"blk.{index}.{stacked}.{suffix}"
        if base in parts and stored in file.tensors and f"blk.{index}.{_LEAVES[parts[0]]}.{suffix}" not in file.tensors:
            ending = "" if suffix == "weight" else f".{suffix}"
            sizes = [tensor_shape(arch, f"layers.{index}.{part}{ending}")[0] for part in parts]
            start = sum(sizes[: parts.index(base)])
            return _Source(_checked(file, stored, (sum(sizes), *shape[1:])), start, start + shape[0])
    return _Source(_checked(file, f"blk.{index}.{_LEAVES[base]}.{suffix}", shape), 0, shape[0])


def _checked(file: GgufFile, name: str, shape: tuple[int, ...]) -> TensorInfo:
    info = file.tensors.get(name)
    if info is None:
        raise CorruptModel(f"{file.path.name} has no tensor {name!r}, which its metadata asks for")
    if info.shape != shape:
        raise CorruptModel(f"{file.path.name}: tensor {name!r} is {info.shape}; the metadata asks for {shape}")
    if info.kind.name not in supported():
        raise UnsupportedModel(
            f"{file.path.name}: tensor {name!r} is stored as {info.kind.name}, which is not read; read are "
            f"{', '.join(supported())}. Take or make another quantization of the model"
        )
    return info
