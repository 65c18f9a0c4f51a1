"""A small sentence encoder as sentence-transformers saves it, and what it computes, in float64."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import models, pre_tokenizers, processors

HIDDEN, HEADS, LAYERS, INNER, POSITIONS = 16, 2, 2, 24, 40
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "sat", "on", "a", "mat", "dog", "ran"]
_erf = np.vectorize(math.erf)


def write_folder(
    folder: Path,
    family: str = "bert",
    pooling: str | None = "mean_tokens",
    normalize: bool = True,
    prefix: str = "",
    **config: Any,
) -> dict[str, NDArray[np.float32]]:
    """Returns the tensors, by their names without ``prefix``. ``pooling`` None: no files of sentence-transformers."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(7)

    def random(*shape: int) -> NDArray[np.float32]:
        return rng.normal(0, 0.3, shape).astype(np.float32)

    tensors = {
        "embeddings.word_embeddings.weight": random(len(WORDS), HIDDEN),
        "embeddings.position_embeddings.weight": random(POSITIONS, HIDDEN),
        "embeddings.token_type_embeddings.weight": random(2, HIDDEN),
    }
    norms = ["embeddings.LayerNorm"]
    for index in range(LAYERS):
        layer = f"encoder.layer.{index}"
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
        for name, rows, columns in (
            *((f"attention.self.{each}", HIDDEN, HIDDEN) for each in ("query", "key", "value")),
            ("attention.output.dense", HIDDEN, HIDDEN),
            ("intermediate.dense", INNER, HIDDEN),
            ("output.dense", HIDDEN, INNER),
        ):
            tensors[f"{layer}.{name}.weight"] = random(rows, columns)
            tensors[f"{layer}.{name}.bias"] = random(rows)
    for name in norms:
        tensors[f"{name}.weight"] = 1 + random(HIDDEN)
        tensors[f"{name}.bias"] = random(HIDDEN)
    save_file({prefix + name: value for name, value in tensors.items()}, folder / "model.safetensors")
    made = {
        "model_type": family,
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "intermediate_size": INNER,
        "vocab_size": len(WORDS),
        "max_position_embeddings": POSITIONS,
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
        "pad_token_id": 0 if family == "bert" else 1,
        **config,
    }
    (folder / "config.json").write_text(json.dumps(made))
    if pooling is not None:
        kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
        listed = [
            {"idx": index, "name": str(index), "path": "" if index == 0 else f"{index}_{kind}", "type": f"x.y.{kind}"}
            for index, kind in enumerate(kinds)
        ]
        (folder / "modules.json").write_text(json.dumps(listed))
        (folder / "1_Pooling").mkdir(exist_ok=True)
        modes = {f"pooling_mode_{each}": each == pooling for each in ("cls_token", "mean_tokens", "max_tokens")}
        if pooling not in ("cls_token", "mean_tokens", "max_tokens"):
            modes[f"pooling_mode_{pooling}"] = True
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": HIDDEN, **modes}))
    _tokenizer().save(str(folder / "tokenizer.json"))
    named = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return tensors


def _tokenizer() -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, "[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    inner.enable_truncation(8)
    inner.enable_padding(length=8)
    return inner


def embedded(
    tensors: dict[str, NDArray[np.float32]], ids: Sequence[int], pooling: str, normalize: bool, first: int = 0
) -> NDArray[np.float64]:
    """(hidden,) of one text: arXiv 1810.04805's network, written as plainly as it goes."""
    held = {name: value.astype(np.float64) for name, value in tensors.items()}
    places = np.arange(len(ids)) + first
    x = held["embeddings.word_embeddings.weight"][list(ids)] + held["embeddings.position_embeddings.weight"][places]
    x = _norm(x + held["embeddings.token_type_embeddings.weight"][0], held, "embeddings.LayerNorm")
    for index in range(LAYERS):
        layer = f"encoder.layer.{index}"
        query, key, value = (_dense(x, held, f"{layer}.attention.self.{each}") for each in ("query", "key", "value"))
        parts = []
        for head in range(HEADS):
            own = slice(head * HIDDEN // HEADS, (head + 1) * HIDDEN // HEADS)
            scores = query[:, own] @ key[:, own].T / math.sqrt(HIDDEN // HEADS)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            parts.append(weights / weights.sum(-1, keepdims=True) @ value[:, own])
        y = _dense(np.concatenate(parts, -1), held, f"{layer}.attention.output.dense")
        x = _norm(x + y, held, f"{layer}.attention.output.LayerNorm")
        y = _dense(x, held, f"{layer}.intermediate.dense")
        y = _dense(y * (1 + _erf(y / math.sqrt(2))) / 2, held, f"{layer}.output.dense")
        x = _norm(x + y, held, f"{layer}.output.LayerNorm")
    pooled = {"mean_tokens": x.mean(0), "cls_token": x[0], "max_tokens": x.max(0)}[pooling]
    return pooled / np.linalg.norm(pooled) if normalize else pooled  # type: ignore[no-any-return]


def _dense(x: NDArray[np.float64], held: dict[str, NDArray[np.float64]], name: str) -> NDArray[np.float64]:
    return x @ held[f"{name}.weight"].T + held[f"{name}.bias"]


def _norm(x: NDArray[np.float64], held: dict[str, NDArray[np.float64]], name: str) -> NDArray[np.float64]:
    centred = x - x.mean(-1, keepdims=True)
    spread = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12)
    return centred / spread * held[f"{name}.weight"] + held[f"{name}.bias"]
