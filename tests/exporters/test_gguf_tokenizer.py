"""Token ids of GGUF vocabularies against llama.cpp's, kept in tests/fixtures/tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime.errors import CorruptModel, UnsupportedModel
from edge_runtime.tokenizer import Tokenizer
from exporters.checkpoint import TextFiles
from exporters.gguf_file import open_gguf
from exporters.gguf_tokenizer import named_templates, read_text
from tests.exporters.gguf_vocabulary import FIXTURES, VARIANTS, write

TEXTS: list[str] = json.loads((FIXTURES / "texts.json").read_text())
TINY: dict[str, Any] = json.loads((FIXTURES / "tiny.json").read_text())
SMOLLM2: dict[str, Any] = json.loads((FIXTURES / "smollm2.json").read_text())


def _read(metadata: dict[str, Any]) -> TextFiles:
    return read_text(metadata, len(metadata["tokenizer.ggml.tokens"]), "tiny.gguf")


def _metadata(tmp_path: Path, name: str) -> dict[str, Any]:
    write(VARIANTS[name], tmp_path / "tiny.gguf")
    return dict(open_gguf(tmp_path / "tiny.gguf").metadata)


def _wrong(text: TextFiles, wanted: dict[str, Any]) -> dict[str, tuple[list[int], list[int]]]:
    """Texts whose ids differ: what we give and what llama.cpp gives."""
    tokenizer = Tokenizer(text.tokenizer_json)
    found = {}
    for kind, parse in (("ids", True), ("plain", False)):
        for string, ids in zip(TEXTS, wanted[kind], strict=True):
            ours = tokenizer.encode(string, parse_special=parse)
            if ours != ids:
                found[f"{kind} {string!r}"] = (ours, ids)
    return found


OWN_EXPRESSION = ("bpe-tekken", "bpe-gpt-4o")
"""See test_known_difference_to_llama_cpp."""


@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in OWN_EXPRESSION])
def test_ids_are_llama_cpps(name: str, tmp_path: Path) -> None:
    text = _read(_metadata(tmp_path, name))
    assert _wrong(text, TINY[name]) == {}
    assert text.add_bos == bool(TINY[name]["bos"])


def test_ids_of_the_real_model_are_llama_cpps(smollm2_gguf: Path) -> None:
    metadata = open_gguf(smollm2_gguf).metadata
    text = _read(dict(metadata))
    assert _wrong(text, SMOLLM2) == {}
    assert text.add_bos is False
    assert text.generation == {"eos_token_id": [2, 0], "bos_token_id": 1, "pad_token_id": 2}
    assert text.special_tokens["bos_token"] == "<|im_start|>"
    assert text.chat_template is not None
    assert "<|im_start|>" in text.chat_template


def test_the_vocabularies_tell_the_splits_apart() -> None:
    """Otherwise equality above would prove nothing about ``pre``."""
    pres = ("gpt-2", "smollm", "qwen2", "llama-bpe", "default", "tekken", "gpt-4o")
    seen = [json.dumps(TINY[f"bpe-{pre}"]["ids"]) for pre in pres]
    assert len(set(seen)) == len(seen)
    assert TINY["bpe-none"] == TINY["bpe-default"]
    assert len({json.dumps(TINY[name]["ids"]) for name in ("spm", "spm-no-prefix", "spm-phi3")}) == 3


@pytest.mark.parametrize("name", OWN_EXPRESSION)
def test_known_difference_to_llama_cpp(name: str, tmp_path: Path) -> None:
    """Where llama.cpp approximates a model's own expression we keep the model's; it shows beyond ASCII only."""
    wrong = _wrong(_read(_metadata(tmp_path, name)), TINY[name])
    assert {key.partition("'")[2][:9] for key in wrong} == {"CamelCase", TEXTS[16][:9], "e\u0301 a\u0308\u0304 Z\u0351"}


@pytest.mark.parametrize("name", ["bpe-smollm", "spm", "spm-no-prefix"])
def test_decoding_gives_the_text_back(name: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer(_read(_metadata(tmp_path, name)).tokenizer_json)
    for text in TEXTS:
        if name == "spm" and ("<" in text or "▁" in text):
            continue  # a space goes before the text and after each marker, and only the first is taken away again
        if "▁" not in text:  # SentencePiece cannot tell this character from a space
            ids = tokenizer.encode(text, parse_special=True)
            assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_merge_with_spaces_is_split_where_all_three_are_tokens(tmp_path: Path) -> None:
    metadata = _metadata(tmp_path, "bpe-gpt-2")
    metadata["tokenizer.ggml.tokens"] += ["x y", "x yz", "x", "y z"]
    metadata["tokenizer.ggml.tokens"] = list(dict.fromkeys(metadata["tokenizer.ggml.tokens"]))
    count = len(metadata["tokenizer.ggml.tokens"])
    metadata["tokenizer.ggml.token_type"] = np.ones(count, np.int32)
    metadata["tokenizer.ggml.merges"] = ["x y z"]
    model = json.loads(_read(metadata).tokenizer_json)["model"]
    assert model["merges"] == [["x y", "z"]]


def test_ends_of_an_answer_and_defaults(tmp_path: Path) -> None:
    metadata = _metadata(tmp_path, "bpe-glm4")
    tokens = metadata["tokenizer.ggml.tokens"]
    tokens[-2:] = ["<|user|>", "<|observation|>"]
    metadata["tokenizer.ggml.merges"] = []
    metadata |= {"tokenizer.ggml.eot_token_id": len(tokens) - 2, "general.sampling.temp": 0.6000000238418579}
    metadata |= {"general.sampling.top_k": 40, "tokenizer.chat_template.tool_use": "x"}
    text = _read(metadata)
    assert text.generation["eos_token_id"] == [2, len(tokens) - 2, 0, len(tokens) - 1]
    assert (text.generation["temperature"], text.generation["top_k"]) == (0.6, 40)
    assert text.add_bos is False
    assert named_templates(metadata) == ["tool_use"]


BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("bpe-gpt-2", {"tokenizer.ggml.pre": "martian"}, UnsupportedModel, "martian"),
    ("bpe-gpt-2", {"tokenizer.ggml.model": "t5"}, UnsupportedModel, "t5"),
    ("bpe-gpt-2", {"tokenizer.ggml.merges": None}, CorruptModel, "merges"),
    ("bpe-gpt-2", {"tokenizer.ggml.merges": ["Ġ nosuchtoken"]}, CorruptModel, "nosuchtoken"),
    ("bpe-gpt-2", {"tokenizer.ggml.add_eos_token": True}, UnsupportedModel, "add_eos_token"),
    ("bpe-llama-bpe", {"tokenizer.ggml.bos_token_id": None}, CorruptModel, "bos"),
    ("bpe-gpt-2", {"tokenizer.ggml.eos_token_id": 10**6}, CorruptModel, "eos_token_id"),
    ("bpe-gpt-2", {"tokenizer.ggml.token_type": np.ones(3, np.int32)}, CorruptModel, "token_type"),
    ("spm", {"tokenizer.ggml.scores": None}, CorruptModel, "scores"),
]


@pytest.mark.parametrize(("name", "change", "error", "said"), BAD)
def test_refusals(name: str, change: dict[str, Any], error: type[Exception], said: str, tmp_path: Path) -> None:
    metadata = _metadata(tmp_path, name) | change
    with pytest.raises(error, match=said):
        _read({key: value for key, value in metadata.items() if value is not None})


def test_endless_tokens_are_refused(tmp_path: Path) -> None:
    """Merges are found by taking tokens apart at every place: 10 MB of one token would take years."""
    metadata = _metadata(tmp_path, "spm")
    metadata["tokenizer.ggml.tokens"][-1] = "x" * 10_000_000
    with pytest.raises(CorruptModel, match="10000000 characters"):
        _read(metadata)
    metadata = _metadata(tmp_path, "bpe-gpt-2")
    metadata["tokenizer.ggml.merges"] = [" " * 1_000_000]
    with pytest.raises(CorruptModel, match="a merge has 1000000 characters"):
        _read(metadata)


def test_vocabulary_must_fit_the_embedding_and_be_unique(tmp_path: Path) -> None:
    metadata = _metadata(tmp_path, "spm")
    tokens = metadata["tokenizer.ggml.tokens"]
    with pytest.raises(CorruptModel, match="embedding"):
        read_text(metadata, len(tokens) + 1, "tiny.gguf")
    tokens[-1] = tokens[-2]
    with pytest.raises(CorruptModel, match="twice"):
        _read(metadata)
