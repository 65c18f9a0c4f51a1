"""Tiny vocabularies as GGUF files, for the tokenizer tests and for the tool that asks llama.cpp about them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np

FIXTURES = Path(__file__).parents[1] / "fixtures" / "tokens"


@dataclass(frozen=True)
class Variant:
    """One way to use a vocabulary of tests/fixtures/tokens."""

    vocabulary: str
    pre: str | None = None
    name: str = "tiny"
    settings: dict[str, bool] = field(default_factory=dict)
    """``tokenizer.ggml.*`` switches."""
    added: tuple[str, ...] = ()
    """Further user-defined tokens."""


VARIANTS = {
    **{f"bpe-{pre}": Variant("bpe", pre) for pre in ("gpt-2", "smollm", "qwen2", "llama-bpe", "glm4", "default")},
    "bpe-tekken": Variant("bpe", "tekken"),
    "bpe-gpt-4o": Variant("bpe", "gpt-4o"),
    "bpe-none": Variant("bpe"),
    "bpe-no-bos": Variant("bpe", "llama-bpe", settings={"add_bos_token": False}),
    "spm": Variant("spm"),
    # Gemma: no space before the text, runs of white space as user-defined tokens with plain spaces
    "spm-no-prefix": Variant("spm", settings={"add_space_prefix": False}, added=("\n\n", "  ", "   ", "    ")),
    "spm-phi3": Variant("spm", name="Phi-3 tiny", settings={"add_bos_token": False}),
}


def write(variant: Variant, path: Path, tensors: dict[str, Any] | None = None) -> None:
    """A GGUF file with the vocabulary and, by default, no tensors."""
    vocabulary = json.loads((FIXTURES / f"vocabulary-{variant.vocabulary}.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(variant.name)
    add_vocabulary(writer, variant, vocabulary)
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, np.asarray(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_vocabulary(writer: gguf.GGUFWriter, variant: Variant, vocabulary: dict[str, Any]) -> None:
    writer.add_tokenizer_model(vocabulary["model"])
    if variant.pre is not None:
        writer.add_tokenizer_pre(variant.pre)
    writer.add_token_list([*vocabulary["tokens"], *variant.added])
    writer.add_token_types([*vocabulary["types"], *[4] * len(variant.added)])
    if "scores" in vocabulary:
        writer.add_token_scores([*vocabulary["scores"], *[-1000.0] * len(variant.added)])
    if "merges" in vocabulary:
        writer.add_token_merges(vocabulary["merges"])
    for name, index in vocabulary["ids"].items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", index)
    for name, value in variant.settings.items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)
