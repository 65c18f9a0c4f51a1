"""A folder as sentence-transformers saves it: a BERT or (XLM-)RoBERTa, how its tokens are pooled, a tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from edge_runtime.errors import CorruptModel, UnsupportedModel
from edge_runtime.package import is_inside
from edge_runtime.tokenizer_json import open_tokenizer
from exporters.fields import Fields
from exporters.hf_text import read_json, special_tokens

Pooling = Literal["mean", "cls", "max"]
FAMILIES = ("bert", "roberta", "xlm-roberta")
_ACTIVATIONS = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}
_PREFIXES = ("", "bert.", "roberta.")
"""Of tensor names, by what class saved them."""


@dataclass(frozen=True)
class EncoderArchitecture:
    family: str
    num_layers: int
    num_heads: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    positions: int
    """Rows of the table of positions."""
    first_position: int
    """Row of a text's first token: RoBERTa leaves those up to its padding id out."""
    norm_eps: float
    gelu: str
    """``approximate`` of ONNX's Gelu."""
    max_tokens: int
    pooling: Pooling
    normalize: bool

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


def is_encoder(folder: Path) -> bool:
    """Whether there is a model in ``folder`` that this module reads."""
    config = folder / "config.json"
    return config.is_file() and read_json(config).get("model_type") in FAMILIES


class EncoderCheckpoint:
    """Raises CorruptModel or UnsupportedModel. Tensors are read when asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.architecture = _architecture(folder, read_json(folder / "config.json"))
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise UnsupportedModel(f"{folder} has no .safetensors file; save the model as safetensors")
        self._handles = {file: _open(file) for file in files}
        self._where = {name: file for file, handle in self._handles.items() for name in handle.keys()}  # noqa: SIM118
        words = [f"{prefix}embeddings.word_embeddings.weight" for prefix in _PREFIXES]
        found = [prefix for prefix, name in zip(_PREFIXES, words, strict=True) if name in self._where]
        if not found:
            raise CorruptModel(f"{folder}: tensor {words[0]} is missing from the weight files")
        self._prefix = found[0]

    def tensor(self, name: str, *shape: int) -> NDArray[np.float32]:
        """Float32, of ``shape``; -1 stands for any number. CorruptModel."""
        full = self._prefix + name
        if full not in self._where:
            raise CorruptModel(f"{self._folder}: tensor {full} is missing from the weight files")
        file = self._where[full]
        try:
            value = np.asarray(self._handles[file].get_tensor(full), np.float32)
        except (SafetensorError, OSError, TypeError) as error:
            raise CorruptModel(f"{file}: tensor {full} cannot be read: {error}") from error
        fits = len(value.shape) == len(shape) and all(
            want in (-1, held) for want, held in zip(shape, value.shape, strict=True)
        )
        if not fits:
            raise CorruptModel(f"{file}: tensor {full} has shape {value.shape}, but config.json makes it {shape}")
        if not np.isfinite(value).all():
            raise CorruptModel(f"{file}: tensor {full} holds values that are not finite")
        return value

    @cached_property
    def tokenizer_json(self) -> str:
        """Without truncation and padding, which are done here; what stands around every text stays."""
        path = self._folder / "tokenizer.json"
        if not path.is_file():
            raise UnsupportedModel(
                f"{self._folder} has no tokenizer.json; save the tokenizer once with Transformers' fast tokenizer"
            )
        text = json.dumps({**read_json(path), "truncation": None, "padding": None}, ensure_ascii=False)
        try:
            tokenizer = open_tokenizer(text)
        except CorruptModel as error:
            raise CorruptModel(f"{path} is not a tokenizer: {error}") from error
        highest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        if highest >= self.architecture.vocab_size:
            size = self.architecture.vocab_size
            raise CorruptModel(f"{path} makes ids up to {highest}, but the model's vocabulary has {size} tokens")
        return text

    @property
    def special_tokens(self) -> dict[str, str]:
        return special_tokens(self._folder)

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """Hashes every weight file on first use."""
        hashes = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in self._handles}
        return {"source": str(self._folder), "format": "safetensors", "sha256": hashes}


def _open(file: Path) -> Any:
    try:
        return safe_open(file, "numpy")
    except (SafetensorError, OSError) as error:
        raise CorruptModel(f"{file} is not a safetensors file: {error}") from error


def _architecture(folder: Path, config: Mapping[str, Any]) -> EncoderArchitecture:
    fields = Fields(config, str(folder / "config.json"))
    family = fields.text("model_type", "")
    if family not in FAMILIES:
        raise UnsupportedModel(f"{folder}: {family!r} is no encoder that is known; known: {', '.join(FAMILIES)}")
    activation = fields.text("hidden_act", "gelu")
    if activation not in _ACTIVATIONS:
        raise UnsupportedModel(
            f"{folder}: hidden_act {activation!r} is not supported; known: {', '.join(_ACTIVATIONS)}"
        )
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise UnsupportedModel(f"{folder}: only absolute positions are supported")
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    positions = fields.integer("max_position_embeddings")
    first = 0 if family == "bert" else fields.integer("pad_token_id", 1, minimum=0) + 1
    pooling, normalize = _pooling(folder)
    limits = folder / "sentence_bert_config.json"
    limit = Fields(_optional(limits), str(limits)).integer("max_seq_length", positions)
    arch = EncoderArchitecture(
        family=family,
        num_layers=fields.integer("num_hidden_layers", maximum=10_000),
        num_heads=heads,
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        vocab_size=fields.integer("vocab_size"),
        positions=positions,
        first_position=first,
        norm_eps=fields.number("layer_norm_eps", 1e-12, above=0),
        gelu=_ACTIVATIONS[activation],
        max_tokens=min(positions - first, limit),
        pooling=pooling,
        normalize=normalize,
    )
    if min(arch.num_layers, heads, arch.max_tokens, arch.vocab_size) < 1 or hidden % heads:
        raise CorruptModel(f"{folder / 'config.json'}: its sizes make no encoder")
    return arch


def _pooling(folder: Path) -> tuple[Pooling, bool]:
    """(how tokens become one vector, whether its length becomes 1), by sentence-transformers' files; without them as it
    does for a bare model: the mean, as it is."""
    modules = folder / "modules.json"
    if not modules.is_file():
        return "mean", False
    try:
        listed = json.loads(modules.read_text(encoding="utf-8"))
        kinds = [str(each["type"]).rsplit(".", 1)[1] for each in listed]
        paths = {kind: str(each["path"]) for kind, each in zip(kinds, listed, strict=True)}
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise CorruptModel(f"{modules} is not what sentence-transformers writes: {error}") from error
    outside = [path for path in paths.values() if path and not is_inside(path)]
    if outside:
        raise CorruptModel(f"{modules}: path {outside[0]!r} leads out of the folder")
    unknown = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
    if unknown:
        raise UnsupportedModel(f"{modules}: {', '.join(unknown)} is not supported")
    place = paths.get("Pooling", "")
    config = _optional(folder / place / "config.json") if "Pooling" in paths else {}
    chosen = [key.removeprefix("pooling_mode_") for key, on in config.items() if key.startswith("pooling_mode_") and on]
    names: dict[str, Pooling] = {"mean_tokens": "mean", "cls_token": "cls", "max_tokens": "max"}  # nosec B105  # none
    if not chosen and isinstance(config.get("pooling_mode"), str):
        chosen = [{"mean": "mean_tokens", "cls": "cls_token", "max": "max_tokens"}.get(config["pooling_mode"], "other")]
    if len(chosen or ["mean_tokens"]) != 1 or (chosen and chosen[0] not in names):
        raise UnsupportedModel(f"{folder}: pooling by {', '.join(chosen)} is not supported; known: {', '.join(names)}")
    return names[chosen[0]] if chosen else "mean", "Normalize" in kinds


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
