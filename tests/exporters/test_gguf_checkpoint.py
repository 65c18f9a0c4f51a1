"""GGUF files of every family, written as llama.cpp's converters write them, read back."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType

from edge_runtime.errors import CorruptModel, UnsupportedModel
from exporters.architecture import Architecture
from exporters.families import architecture
from exporters.gguf_checkpoint import GgufCheckpoint
from exporters.gguf_file import open_gguf
from exporters.network import tensor_names
from exporters.weights import QuantizedTensor, dequantize
from tests.exporters.gguf_model import permute, random_tensors, write_model

FAMILIES = Path(__file__).parents[1] / "fixtures" / "families"

UNSTORED: dict[str, dict[str, Any]] = {
    # what a GGUF cannot say is set to what llama.cpp assumes
    "mistral": {"model_type": "llama", "sliding_window": None},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3": {"query_pre_attn_scalar": 16},
    "gemma3-new": {"layer_types": ["sliding_attention"] * 2},
    "smollm3": {"no_rope_layers": None, "use_sliding_window": False, "num_hidden_layers": 5},
}
NAMES = [
    *("llama", "llama-linear", "llama-llama3", "llama-yarn", "mistral", "qwen2", "qwen3", "glm", "glm-edge", "glm4"),
    *("phi3", "phi3-longrope", "gemma2", "gemma3", "gemma3-new", "granite", "smollm3"),
]


def _config(name: str) -> dict[str, Any]:
    config = json.loads((FAMILIES / name / "config.json").read_text()) | UNSTORED.get(name, {})
    return {key: value for key, value in config.items() if value is not None}


def _rounded(arch: Architecture) -> Architecture:
    """Frequencies without the digits that factors lose as float32 (rope_freqs, rope_factors)."""

    def close(values: tuple[float, ...] | None) -> tuple[float, ...] | None:
        return None if values is None else tuple(float(f"{value:.5g}") for value in values)

    layers = []
    for layer in arch.layers:
        rope = layer.rope
        if rope is not None:
            rope = replace(rope, inv_freq=close(rope.inv_freq) or (), long_inv_freq=close(rope.long_inv_freq))
        layers.append(replace(layer, rope=rope))
    return replace(arch, layers=tuple(layers))


@pytest.mark.parametrize("name", NAMES)
def test_family(name: str, tmp_path: Path) -> None:
    config = _config(name)
    arch = architecture(config)
    tensors = random_tensors(arch)
    write_model(tmp_path / "tiny.gguf", config, tensors)
    checkpoint = GgufCheckpoint(tmp_path / "tiny.gguf")
    assert _rounded(checkpoint.architecture) == _rounded(arch)
    for tensor in tensor_names(arch):
        np.testing.assert_array_equal(dequantize(checkpoint.tensor(tensor)), tensors[tensor], err_msg=tensor)
    with pytest.raises(KeyError):
        checkpoint.tensor("layers.0.nothing")


def test_a_vector_near_the_end_of_the_file(tmp_path: Path) -> None:
    """Its elements are no rows: what lies behind it, here factors of another length, is not read."""
    config = _config("llama-llama3")
    tensors = random_tensors(architecture(config))
    tensors["norm"] = tensors.pop("norm")
    write_model(tmp_path / "tiny.gguf", config, tensors)
    np.testing.assert_array_equal(GgufCheckpoint(tmp_path / "tiny.gguf").tensor("norm"), tensors["norm"])


@pytest.mark.parametrize("name", ["llama", "glm"])
def test_fused_qkv(name: str, tmp_path: Path) -> None:
    config = _config(name)
    tensors = random_tensors(architecture(config))
    write_model(tmp_path / "tiny.gguf", config, tensors, fuse_qkv=True)
    checkpoint = GgufCheckpoint(tmp_path / "tiny.gguf")
    for tensor, values in tensors.items():
        np.testing.assert_array_equal(dequantize(checkpoint.tensor(tensor)), values, err_msg=tensor)


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_quantized_rows_are_split_and_ordered(name: str, tmp_path: Path) -> None:
    config = _config(name)
    arch = architecture(config)
    tensors = random_tensors(arch)
    write_model(tmp_path / "tiny.gguf", config, tensors, kind=GGMLQuantizationType.Q4_1)
    checkpoint = GgufCheckpoint(tmp_path / "tiny.gguf")
    for leaf in ("q", "k", "v", "gate", "up", "down"):
        tensor = checkpoint.tensor(f"layers.1.{leaf}")
        assert isinstance(tensor, QuantizedTensor)
        rounded = gguf.quants.quantize(tensors[f"layers.1.{leaf}"], GGMLQuantizationType.Q4_1)
        wanted = gguf.quants.dequantize(rounded, GGMLQuantizationType.Q4_1)
        np.testing.assert_allclose(tensor.dequantize(), wanted, rtol=0, atol=2e-6)
    assert isinstance(checkpoint.tensor("norm"), np.ndarray)


def test_real_model(smollm2_gguf: Path) -> None:
    """Every matrix against the gguf package's own dequantization."""
    checkpoint = GgufCheckpoint(smollm2_gguf)
    arch = checkpoint.architecture
    assert (arch.family, arch.num_layers, arch.hidden_size, arch.vocab_size) == ("llama", 30, 576, 49152)
    assert (arch.norm_eps, arch.tied_head, arch.max_context) == (1e-5, True, 8192)
    rope = arch.layers[0].rope
    assert rope is not None
    assert not rope.interleaved
    raw = {tensor.name: tensor for tensor in gguf.GGUFReader(smollm2_gguf).tensors}
    for name, stored in {"layers.3.q": "attn_q", "layers.3.k": "attn_k", "layers.3.down": "ffn_down"}.items():
        tensor = raw[f"blk.3.{stored}.weight"]
        found = checkpoint.tensor(name)
        assert isinstance(found, QuantizedTensor)
        assert (found.bits, found.group) == (4, 32)
        values = found.dequantize()
        if stored != "ffn_down":
            values = permute(values, 9 if stored == "attn_q" else 3)
        wanted = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_allclose(values, wanted, rtol=1e-6, atol=1e-7)
    assert isinstance(checkpoint.tensor("embed"), QuantizedTensor)
    assert checkpoint.provenance["licence"] == "apache-2.0"
    assert checkpoint.provenance["sha256"] == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def test_structure_is_what_the_gguf_package_reads(smollm2_gguf: Path) -> None:
    ours, theirs = open_gguf(smollm2_gguf), gguf.GGUFReader(smollm2_gguf)
    fields = {key: field for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert list(ours.metadata) == list(fields)
    for key, value in ours.metadata.items():
        found = value.tolist() if isinstance(value, np.ndarray) else value
        assert found == fields[key].contents(), key
    placed = {info.name: (info.offset, info.nbytes, info.kind) for info in ours.tensors.values()}
    assert placed == {t.name: (t.data_offset, t.n_bytes, t.tensor_type) for t in theirs.tensors}


# ---- refusals


def _key(name: str, value: Any) -> Callable[[gguf.GGUFWriter], None]:
    add = {bool: "add_bool", int: "add_uint32", float: "add_float32", str: "add_string"}[type(value)]
    return lambda writer: getattr(writer, add)(name, value)


def _tensor(name: str, *shape: int) -> Callable[[gguf.GGUFWriter], None]:
    return lambda writer: writer.add_tensor(name, np.ones(shape, np.float32))


REFUSED: list[tuple[str, Callable[[gguf.GGUFWriter], None], str]] = [
    ("llama", _key("llama.attention.clever_trick", 1), "clever_trick"),
    ("llama", _key("llama.attention.sliding_window", 16), "sliding_window"),
    ("llama", _key("llama.expert_count", 8), "expert_count"),
    ("llama", _key("llama.attention.causal", False), "causal"),
    ("llama", _key("llama.rope.scaling.type", "dynamic"), "dynamic"),
    ("llama", _key("split.count", 3), "split.count"),
    ("llama", _tensor("blk.0.attn_sinks.weight", 4), "attn_sinks"),
    ("llama", _tensor("blk.0.attn_output.bias", 32), "attn_output.bias"),
    ("glm4", _key("glm4.nextn_predict_layers", 1), "nextn_predict_layers"),
    ("granite", _key("granite.rope.scaling.finetuned", False), "finetuned"),
    ("gemma3", _tensor("rope_freqs.weight", 8), "rope_freqs"),
]


@pytest.mark.parametrize(("name", "extra", "said"), REFUSED)
def test_refused_by_name(name: str, extra: Callable[[gguf.GGUFWriter], None], said: str, tmp_path: Path) -> None:
    config = _config(name)
    write_model(tmp_path / "tiny.gguf", config, random_tensors(architecture(config)), extra=extra)
    with pytest.raises(UnsupportedModel, match=said):
        GgufCheckpoint(tmp_path / "tiny.gguf")


def test_unknown_architecture_and_tensor_type(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "martian")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UnsupportedModel, match="martian"):
        GgufCheckpoint(tmp_path / "other.gguf")

    config = _config("llama") | {"hidden_size": 256, "intermediate_size": 256}
    tensors = random_tensors(architecture(config))
    rows = tensors.pop("layers.1.gate").shape[0]
    raw = np.zeros((rows, 84), np.uint8)  # one block of 256 weights
    kind = GGMLQuantizationType.Q2_K
    write_model(
        tmp_path / "tiny.gguf",
        config,
        tensors,
        extra=lambda writer: writer.add_tensor("blk.1.ffn_gate.weight", raw, raw_dtype=kind),
    )
    with pytest.raises(UnsupportedModel, match=r"blk\.1\.ffn_gate\.weight.*Q2_K"):
        GgufCheckpoint(tmp_path / "tiny.gguf")


def test_tensors_must_be_there_and_fit(tmp_path: Path) -> None:
    config = _config("qwen3")
    tensors = random_tensors(architecture(config))
    write_model(tmp_path / "a.gguf", config, {name: t for name, t in tensors.items() if name != "layers.2.v"})
    with pytest.raises(CorruptModel, match=r"blk\.2\.attn_v\.weight"):
        GgufCheckpoint(tmp_path / "a.gguf")
    tensors["layers.1.up"] = tensors["layers.1.up"][:-1]
    write_model(tmp_path / "b.gguf", config, tensors)
    with pytest.raises(CorruptModel, match=r"blk\.1\.ffn_up\.weight"):
        GgufCheckpoint(tmp_path / "b.gguf")
    for field in ("num_hidden_layers", "num_attention_heads", "head_dim", "hidden_size"):
        tensors = random_tensors(architecture(config))
        huge = config | {field: 2**31}
        with pytest.MonkeyPatch.context() as patch:  # the writer needs the real architecture
            patch.setattr("tests.exporters.gguf_model.architecture", lambda _: architecture(config))
            write_model(tmp_path / f"{field}.gguf", huge, tensors)
        with pytest.raises(CorruptModel):
            GgufCheckpoint(tmp_path / f"{field}.gguf")
