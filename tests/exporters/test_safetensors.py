"""Safetensors folders: whole ones read right, damaged ones refused clearly; tokenizer files beside them."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from edge_runtime.errors import CorruptModel, ModelError, ModelNotFound, UnsupportedModel
from exporters.hf_text import read_text_files
from exporters.network import tensor_names
from exporters.safetensors_checkpoint import SafetensorsCheckpoint
from exporters.synthetic import CONFIGS, SyntheticCheckpoint

FAMILIES = Path(__file__).parents[1] / "fixtures" / "families"


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[str], Path]:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(FAMILIES / name, tmp_path / name))

    return copy


def change_weights(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors")


def test_values_and_types() -> None:
    path = FAMILIES / "phi3"
    stored = load_file(path / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {
        np.dtype(np.float32),
        np.dtype(np.float16),
        np.dtype(ml_dtypes.bfloat16),
    }
    checkpoint = SafetensorsCheckpoint(path)
    qkv = stored["model.layers.1.self_attn.qkv_proj.weight"].astype(np.float32)
    parts = [checkpoint.tensor(f"layers.1.{name}") for name in ("q", "k", "v")]
    np.testing.assert_array_equal(np.concatenate(parts), qkv)
    gate_up = stored["model.layers.0.mlp.gate_up_proj.weight"].astype(np.float32)
    np.testing.assert_array_equal(checkpoint.tensor("layers.0.up"), gate_up[64:])
    assert all(checkpoint.tensor(name).dtype == np.float32 for name in tensor_names(checkpoint.architecture))


def test_gemma_norms_hold_the_whole_factor() -> None:
    stored = load_file(FAMILIES / "gemma3" / "model.safetensors")
    checkpoint = SafetensorsCheckpoint(FAMILIES / "gemma3")
    for name, origin in [
        ("norm", "model.norm.weight"),
        ("layers.2.q_norm", "model.layers.2.self_attn.q_norm.weight"),
        ("layers.2.mlp_post_norm", "model.layers.2.post_feedforward_layernorm.weight"),
    ]:
        np.testing.assert_array_equal(checkpoint.tensor(name), stored[origin] + np.float32(1))


def test_unknown_tensor_name() -> None:
    with pytest.raises(KeyError):
        SafetensorsCheckpoint(FAMILIES / "llama").tensor("head")  # tied: there is none


def test_provenance(folder: Callable[[str], Path]) -> None:
    path = folder("qwen2")
    (path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# card\n")
    found = SafetensorsCheckpoint(path).provenance
    assert found["format"] == "safetensors"
    assert found["licence"] == "apache-2.0"
    assert sorted(found["sha256"]) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_file(folder: Callable[[str], Path], keep: int) -> None:
    file = folder("llama") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CorruptModel, match=r"model\.safetensors is truncated"):
        SafetensorsCheckpoint(file.parent)


def _header(tensors: dict[str, Any]) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text + bytes(64)


HOSTILE = {
    "length": struct.pack("<Q", 2**60) + b"{}",
    "length of all bits": struct.pack("<Q", 2**64 - 1) + b"{}",
    "nesting": struct.pack("<Q", 100_000) + b"[" * 100_000,
    "offsets": _header({"model.norm.weight": {"dtype": "F32", "shape": [2**61], "data_offsets": [0, 2**63]}}),
    "offsets backwards": _header({"model.norm.weight": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}}),
    "shape that overflows": _header(
        {"model.norm.weight": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 16]}}
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers(name: str, folder: Callable[[str], Path]) -> None:
    path = folder("llama")
    (path / "model.safetensors").write_bytes(HOSTILE[name])
    with pytest.raises(CorruptModel, match="not a safetensors file"):
        SafetensorsCheckpoint(path)


@pytest.mark.parametrize("name", ["head_dim", "max_position_embeddings", "num_hidden_layers"])
def test_a_configuration_alone_takes_no_memory(name: str, folder: Callable[[str], Path]) -> None:
    path = folder("llama")
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    write(path / "config.json", {**config, name: 10**9})
    with pytest.raises(CorruptModel, match=rf"{name} must be an integer from 1 to \d+, not 1000000000"):
        SafetensorsCheckpoint(path)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/model.safetensors", "a/b.safetensors"])
def test_an_index_stays_in_its_folder(name: str, folder: Callable[[str], Path]) -> None:
    path = folder("llama")
    (path / "model.safetensors").rename(path.parent / "model.safetensors")
    write(path / "model.safetensors.index.json", {"weight_map": {"model.norm.weight": name}})
    with pytest.raises(CorruptModel, match="not a plain file name"):
        SafetensorsCheckpoint(path)


def test_missing_tensor(folder: Callable[[str], Path]) -> None:
    path = folder("llama")
    change_weights(path, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CorruptModel, match=r"layers\.1\.mlp\.up_proj\.weight is missing"):
        SafetensorsCheckpoint(path)


def test_wrong_shape(folder: Callable[[str], Path]) -> None:
    path = folder("llama")
    change_weights(path, lambda weights: weights.update({"model.norm.weight": np.ones(33, np.float32)}))
    with pytest.raises(CorruptModel, match=r"model\.norm\.weight has shape \(33,\).*\(32,\)"):
        SafetensorsCheckpoint(path)


def test_leftover_tensor(folder: Callable[[str], Path]) -> None:
    path = folder("llama")
    change_weights(path, lambda weights: weights.update({"model.layers.0.self_attn.q_proj.bias": np.ones(64, "f4")}))
    with pytest.raises(UnsupportedModel, match=r"q_proj\.bias"):
        SafetensorsCheckpoint(path)


def test_old_frequency_buffers_are_no_leftovers(folder: Callable[[str], Path]) -> None:
    path = folder("llama")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_weights(path, lambda weights: weights.update({name: np.ones(8, np.float32)}))
    SafetensorsCheckpoint(path)


def test_unsupported_tensor_type(folder: Callable[[str], Path]) -> None:
    path = folder("llama")
    change_weights(path, lambda weights: weights.update({"model.norm.weight": np.ones(32, np.int8)}))
    with pytest.raises(UnsupportedModel, match="I8"):
        SafetensorsCheckpoint(path)


def test_values_that_are_not_finite(folder: Callable[[str], Path]) -> None:
    path = folder("llama")
    change_weights(path, lambda weights: weights.update({"model.norm.weight": np.full(32, np.nan, "f4")}))
    with pytest.raises(CorruptModel, match="not finite"):
        SafetensorsCheckpoint(path).tensor("norm")


@pytest.mark.parametrize("same", [True, False])
def test_tied_head_in_the_file(folder: Callable[[str], Path], same: bool) -> None:
    path = folder("llama")

    def add_head(weights: dict[str, Any]) -> None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
        weights["lm_head.weight"][5, 5] += 0 if same else 1

    change_weights(path, add_head)
    if same:
        assert SafetensorsCheckpoint(path).architecture.tied_head
    else:
        with pytest.raises(CorruptModel, match=r"lm_head\.weight differs"):
            SafetensorsCheckpoint(path)


def test_shards(folder: Callable[[str], Path]) -> None:
    path = folder("qwen2")
    index = path / "model.safetensors.index.json"
    good = index.read_text()
    for bad, names in [
        (good.replace("00001-of", "00009-of"), "00009-of-00002.safetensors is named"),
        (good.replace("model-00001", "../model-00001"), "not a plain file name"),
        ('{"weight_map": 3}', "weight_map"),
        ("{", "not readable JSON"),
        (good.replace('"model.norm.weight"', '"model.nurm.weight"'), "nurm"),
    ]:
        index.write_text(bad)
        with pytest.raises(CorruptModel, match=names):
            SafetensorsCheckpoint(path)
    index.unlink()
    with pytest.raises(ModelNotFound, match=r"neither model\.safetensors"):
        SafetensorsCheckpoint(path)


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"config\.json"):
        SafetensorsCheckpoint(tmp_path)


# ---- tokenizer files


@pytest.fixture
def text_folder(tmp_path: Path) -> Path:
    write(tmp_path / "tokenizer.json", json.loads(SyntheticCheckpoint("tiny").text.tokenizer_json))
    write(tmp_path / "tokenizer_config.json", {"bos_token": {"content": "<|system|>"}, "eos_token": "<|endoftext|>"})
    return tmp_path


def write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def template(*tokens: str) -> dict[str, Any]:
    """The post-processor that puts ``tokens`` before a text."""
    pieces = [{"SpecialToken": {"id": token, "type_id": 0}} for token in tokens]
    special = {token: {"id": token, "ids": [509], "tokens": [token]} for token in tokens}
    one, two = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [*pieces, one],
        "pair": [*pieces, one, two],
        "special_tokens": special,
    }


def edit_tokenizer(folder: Path, **fields: Any) -> None:
    write(folder / "tokenizer.json", {**json.loads((folder / "tokenizer.json").read_text()), **fields})


@pytest.mark.parametrize("nested", [False, True])
def test_bos_of_the_post_processor_becomes_add_bos(text_folder: Path, nested: bool) -> None:
    processor = template("<|system|>", "<|user|>")
    edit_tokenizer(text_folder, post_processor={"type": "Sequence", "processors": [processor]} if nested else processor)
    text = read_text_files(text_folder, {})
    assert text.add_bos
    tokenizer = Tokenizer.from_str(text.tokenizer_json)
    assert tokenizer.encode("a").tokens == ["<|user|>", "a"]  # only the BOS has moved
    assert tokenizer.encode("a", add_special_tokens=False).tokens == ["a"]
    assert text.generation["bos_token_id"] == tokenizer.token_to_id("<|system|>")


def test_add_bos_token_without_post_processor(text_folder: Path) -> None:
    assert not read_text_files(text_folder, {}).add_bos
    settings = json.loads((text_folder / "tokenizer_config.json").read_text())
    write(text_folder / "tokenizer_config.json", {**settings, "add_bos_token": True})
    assert read_text_files(text_folder, {}).add_bos
    with pytest.raises(CorruptModel, match="bos_token_id"):
        read_text_files(text_folder, {"bos_token_id": 3})


def test_stored_truncation_is_dropped(text_folder: Path) -> None:
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    edit_tokenizer(text_folder, truncation=truncation)
    assert len(Tokenizer.from_str(read_text_files(text_folder, {}).tokenizer_json).encode("abcdef").ids) == 6


def test_template_order(text_folder: Path) -> None:
    assert read_text_files(text_folder, {}).chat_template is None
    write(text_folder / "tokenizer_config.json", {"chat_template": [{"name": "default", "template": "old"}]})
    assert read_text_files(text_folder, {}).chat_template == "old"
    (text_folder / "chat_template.jinja").write_text("new")
    assert read_text_files(text_folder, {}).chat_template == "new"


def test_a_template_that_is_no_text(text_folder: Path) -> None:
    (text_folder / "chat_template.jinja").write_bytes(b"{{ messages }}\xff")
    with pytest.raises(CorruptModel, match=r"chat_template\.jinja cannot be read"):
        read_text_files(text_folder, {})


def test_generation_defaults(text_folder: Path) -> None:
    write(text_folder / "generation_config.json", {"temperature": 0.2, "eos_token_id": [1, 2], "top_p": None})
    found = read_text_files(text_folder, {"eos_token_id": 9, "pad_token_id": 4}).generation
    assert found == {"temperature": 0.2, "eos_token_id": [1, 2], "pad_token_id": 4, "bos_token_id": 509}
    (text_folder / "generation_config.json").unlink()
    assert read_text_files(text_folder, {"eos_token_id": 9}).generation["eos_token_id"] == 9
    assert read_text_files(text_folder, {}).generation["eos_token_id"] == 508
    assert read_text_files(text_folder, {}).special_tokens["bos_token"] == "<|system|>"


def test_damaged_text_files(text_folder: Path) -> None:
    write(text_folder / "generation_config.json", {"eos_token_id": "two"})
    with pytest.raises(CorruptModel, match="eos_token_id"):
        read_text_files(text_folder, {})
    (text_folder / "generation_config.json").unlink()
    edit_tokenizer(text_folder, model={"type": "Nonsense"})
    with pytest.raises(CorruptModel, match="not a tokenizer"):
        read_text_files(text_folder, {})
    (text_folder / "tokenizer.json").write_text('{"model"')
    with pytest.raises(CorruptModel, match="not readable JSON"):
        read_text_files(text_folder, {})
    (text_folder / "tokenizer.json").write_text('{"bos_token": "\\ud800"}')
    with pytest.raises(CorruptModel, match="surrogates not allowed"):
        read_text_files(text_folder, {})
    (text_folder / "tokenizer.json").write_text("[" * 100_000)
    with pytest.raises(CorruptModel, match="not readable JSON"):
        read_text_files(text_folder, {})
    (text_folder / "tokenizer.json").unlink()
    with pytest.raises(UnsupportedModel, match=r"no tokenizer\.json"):
        read_text_files(text_folder, {})


# ---- synthetic


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_synthetic_models_have_text_and_shapes(name: str) -> None:
    checkpoint = SyntheticCheckpoint(name)
    arch = checkpoint.architecture
    tokenizer = Tokenizer.from_str(checkpoint.text.tokenizer_json)
    assert tokenizer.get_vocab_size() == arch.vocab_size
    assert tokenizer.decode(tokenizer.encode("a é 😀\n").ids) == "a é 😀\n"
    assert all(tokenizer.id_to_token(index) for index in checkpoint.text.generation["eos_token_id"])
    assert checkpoint.tensor("layers.1.k").shape == (arch.kv_heads(1) * arch.head_dim, arch.hidden_size)


def test_synthetic_weights_repeat_and_differ() -> None:
    one, two = SyntheticCheckpoint("tiny"), SyntheticCheckpoint("tiny")
    two.tensor("embed")
    np.testing.assert_array_equal(one.tensor("layers.2.q"), two.tensor("layers.2.q"))
    assert not np.array_equal(one.tensor("layers.2.q"), one.tensor("layers.1.q"))
    with pytest.raises(KeyError):
        one.tensor("layers.9.q")


def test_unknown_synthetic_model() -> None:
    with pytest.raises(ModelError, match="glm-edge-4b"):
        SyntheticCheckpoint("glm-edge-9b")
