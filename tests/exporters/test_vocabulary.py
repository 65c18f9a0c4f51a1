"""A tokenizer must belong to the weights beside it, whatever kind of file it comes from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import pytest
from tokenizers import AddedToken, Tokenizer, models

from edge_runtime.errors import CorruptModel
from edge_runtime.package import Package
from exporters.export import export
from exporters.families import architecture
from exporters.formats import open_checkpoint
from tests.exporters.gguf_model import random_tensors, write_model

LLAMA = Path(__file__).parents[1] / "fixtures" / "families" / "llama"
VOCABULARY = 96
"""Rows of the embedding."""


def safetensors(folder: Path, tokens: int, added: int = 0) -> Path:
    """The fixture with a tokenizer of so many tokens, ``added`` of them added ones at the end."""
    shutil.copytree(LLAMA, folder)
    tokenizer = Tokenizer(models.BPE({chr(32 + index): index for index in range(tokens - added)}, []))
    tokenizer.add_tokens([AddedToken(f"<{index}>") for index in range(added)])
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    return folder


def gguf_file(path: Path, tokens: int) -> Path:
    config = json.loads((LLAMA / "config.json").read_text())

    def others(writer: gguf.GGUFWriter) -> None:
        del writer.kv_data[0]["tokenizer.ggml.tokens"]
        writer.add_token_list(["t", "1", *(f"t{index}" for index in range(1, tokens - 1))])

    write_model(path, config, random_tensors(architecture(config)), extra=others)
    return path


@pytest.mark.parametrize("kind", ["gguf", "safetensors"])
def test_ids_past_the_vocabulary(tmp_path: Path, kind: str) -> None:
    make = safetensors if kind == "safetensors" else gguf_file
    source = make(tmp_path / f"tiny.{kind}", VOCABULARY + 1)
    with pytest.raises(CorruptModel, match=r"9[67].*96"):
        export(open_checkpoint(source), tmp_path / "made", ("onnx",), "fp32")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("tokens", [VOCABULARY, VOCABULARY - 20])
def test_a_smaller_tokenizer_is_padding(tmp_path: Path, tokens: int) -> None:
    export(open_checkpoint(safetensors(tmp_path / "tiny", tokens)), tmp_path / "made", ("onnx",), "fp32")
    Package.open(tmp_path / "made").verify()


def test_an_added_token_past_the_vocabulary_is_left_to_the_prompts(tmp_path: Path) -> None:
    source = safetensors(tmp_path / "tiny", VOCABULARY + 1, added=1)  # as in Gemma 3's text models
    export(open_checkpoint(source), tmp_path / "made", ("onnx",), "fp32")
    Package.open(tmp_path / "made").verify()
