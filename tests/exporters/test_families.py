"""Every family against Transformers' logits, through the network written once and a plain numpy builder."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime.errors import CorruptModel, ModelError, UnsupportedModel
from exporters.architecture import Rope
from exporters.families import FAMILIES, architecture
from exporters.hf_names import source, tensor_shape
from exporters.network import tensor_names
from exporters.safetensors_checkpoint import SafetensorsCheckpoint
from tests.exporters.numpy_builder import run

FOLDER = Path(__file__).parents[1] / "fixtures" / "families"
MODELS = sorted(path.name for path in FOLDER.iterdir())
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}


def sized(model_type: str, **fields: Any) -> dict[str, Any]:
    return {"model_type": model_type, **SIZES, **fields}


def rope_of(config: dict[str, Any], layer: int = 0) -> Rope:
    rope = architecture(config).layers[layer].rope
    assert rope is not None
    return rope


@pytest.mark.parametrize("name", MODELS)
def test_logits_agree_with_transformers(name: str) -> None:
    checkpoint = SafetensorsCheckpoint(FOLDER / name)
    reference = np.load(FOLDER / name / "reference.npz")
    lengths = [int(key.removeprefix("logits_")) for key in reference if key.startswith("logits_")]
    assert len(lengths) == 3
    for length in lengths:
        logits = run(checkpoint, reference["ids"][:length])
        np.testing.assert_allclose(logits, reference[f"logits_{length}"], rtol=0, atol=1e-4)


def test_every_family_has_a_reference() -> None:
    families = {json.loads((FOLDER / name / "config.json").read_text())["model_type"] for name in MODELS}
    assert families == set(FAMILIES)


def test_references_go_past_windows_and_longrope_switch() -> None:
    longest = 72
    for name in MODELS:
        arch = SafetensorsCheckpoint(FOLDER / name).architecture
        assert all(layer.sliding_window is None or layer.sliding_window < longest for layer in arch.layers)
        assert arch.rope_switch is None or 24 < arch.rope_switch < longest


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_defaults_suffice_beside_sizes(family: str) -> None:
    arch = architecture(sized(family))
    assert len(arch.layers) == 6
    for name in tensor_names(arch):
        part = source(arch, name)
        assert (part.stop - part.start, *part.shape[1:]) == tensor_shape(arch, name)


def test_config_is_not_changed() -> None:
    config = json.loads((FOLDER / "gemma3" / "config.json").read_text())
    before = json.dumps(config)
    architecture(config)
    assert json.dumps(config) == before


# ---- both layouts of rope fields


def test_old_and_new_rope_layouts_agree() -> None:
    scaling = {"rope_type": "linear", "factor": 4.0}
    old = architecture(sized("llama", rope_theta=5e5, rope_scaling=scaling))
    new = architecture(sized("llama", rope_parameters={**scaling, "rope_theta": 5e5}))
    nested = architecture(sized("llama", rope_parameters={"full_attention": {**scaling, "rope_theta": 5e5}}))
    assert old == new == nested


def test_gemma3_layouts_agree() -> None:
    full, local = {"rope_type": "linear", "factor": 8.0}, {"rope_type": "default", "rope_theta": 2e4}
    old = architecture(sized("gemma3_text", rope_theta=1e6, rope_local_base_freq=2e4, rope_scaling=full))
    parameters = {"full_attention": {**full, "rope_theta": 1e6}, "sliding_attention": local}
    new = architecture(sized("gemma3_text", rope_parameters=parameters))
    assert old == new
    assert old.layers[0].rope != old.layers[5].rope


def test_linear_rope_by_hand() -> None:
    rope = rope_of(sized("llama", rope_theta=10000.0, rope_scaling={"type": "linear", "factor": 4.0}))
    assert rope.inv_freq == pytest.approx([10000 ** (-2 * i / 16) / 4 for i in range(8)])


def test_llama3_rope_keeps_short_waves_and_slows_long_ones() -> None:
    params = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    rope = rope_of(sized("llama", rope_scaling={"rope_type": "llama3", **params}))
    plain = rope_of(sized("llama"))
    for scaled, base in zip(rope.inv_freq, plain.inv_freq, strict=True):
        turns = 64 * base / (2 * math.pi)
        if turns > 4:
            assert scaled == pytest.approx(base)
        elif turns < 1:
            assert scaled == pytest.approx(base / 8)
        else:
            assert base / 8 < scaled < base


def test_longrope_scale_from_the_ratio_of_contexts() -> None:
    config = sized(
        "phi3",
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        rope_scaling={**LONGROPE, "type": "su"},
    )
    rope = rope_of(config)
    assert rope.scale == rope.long_scale == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))
    assert rope.long_inv_freq is not None
    assert np.asarray(rope.inv_freq) / np.asarray(rope.long_inv_freq) == pytest.approx(4)
    assert architecture(config).rope_switch == 4096


def test_rope_layers_and_windows_of_smollm3() -> None:
    arch = architecture(sized("smollm3", use_sliding_window=True, sliding_window=8))
    assert [layer.rope is None for layer in arch.layers] == [False, False, False, True, False, False]
    assert [layer.sliding_window for layer in arch.layers] == [None, None, None, 8, None, None]


# ---- refused


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({**sized("llama"), "model_type": "mamba"}, "mamba"),
        (sized("llama", rope_scaling={"type": "dynamic", "factor": 2.0}), "dynamic"),
        (sized("llama", rope_scaling={"type": "linear", "factor": 2.0, "wobble": 1}), "wobble"),
        (sized("llama", hidden_act="relu2"), "relu2"),
        (sized("llama", attn_temperature_tuning=True), "attn_temperature_tuning"),
        (sized("llama", quantization_config={"bits": 4}), "quantization_config"),
        (sized("llama", partial_rotary_factor=0.5), "partial_rotary_factor"),
        (sized("llama", is_encoder_decoder=True), "is_encoder_decoder"),
        (sized("qwen2", attention_bias=False), "attention_bias"),
        (sized("qwen2", layer_types=["linear_attention"] * 6), "linear_attention"),
        (sized("gemma2", use_bidirectional_attention=True), "use_bidirectional_attention"),
        (sized("gemma3_text", attn_logit_softcapping=50.0), "attn_logit_softcapping"),
        (sized("gemma3_text", rope_parameters={"rope_type": "default"}), "rope_parameters"),
        (sized("mistral", layer_types=["full_attention"] * 6), "layer_types"),
        (sized("glm", mlp_bias=True), "mlp_bias"),
    ],
)
def test_what_is_not_run_is_refused_by_name(config: dict[str, Any], names: str) -> None:
    with pytest.raises(UnsupportedModel, match=names):
        architecture(config)


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({**sized("llama"), "model_type": None}, "model_type"),
        ({key: value for key, value in sized("llama").items() if key != "hidden_size"}, "hidden_size is missing"),
        (sized("llama", hidden_size="64"), "hidden_size"),
        (sized("llama", hidden_size=True), "hidden_size"),
        (sized("llama", num_hidden_layers=0), "num_hidden_layers"),
        (
            sized("llama", max_position_embeddings=2**32 - 1),
            "max_position_embeddings must be an integer from 1 to 2097152",
        ),
        (sized("llama", head_dim=2**31), "head_dim must be an integer from 1 to 65536"),
        (sized("llama", num_key_value_heads=3), "3 key-value heads"),
        (sized("llama", hidden_size=66), "multiple"),
        (sized("llama", rms_norm_eps=float("nan")), "rms_norm_eps"),
        (sized("llama", rms_norm_eps=-1e-5), "rms_norm_eps"),
        (sized("llama", rope_theta=0), "rope_theta"),
        (sized("llama", rope_parameters={"rope_theta": 0}), "rope_theta"),
        (sized("llama", rope_theta=1e4, rope_parameters={"rope_theta": 1e5}), "rope_theta"),
        (sized("llama", rope_parameters={"rope_theta": 1e4}, rope_scaling={"type": "linear"}), "both"),
        (sized("llama", rope_scaling={"type": "linear"}), "factor is missing"),
        (sized("llama", rope_scaling={"type": "linear", "rope_type": "yarn", "factor": 2.0}), "contradicts"),
        (sized("llama", rope_scaling=[1]), "rope_scaling"),
        (sized("llama", tie_word_embeddings="yes"), "tie_word_embeddings"),
        (sized("phi3", rope_scaling={"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}), "short_factor"),
        (sized("phi3", rope_scaling=LONGROPE, original_max_position_embeddings=1), "original_max_position_embeddings"),
        (sized("qwen2", layer_types=["full_attention"]), "layer_types"),
        (sized("qwen2", layer_types=["sliding_attention"] * 6), "sliding_window"),
        (sized("glm", partial_rotary_factor=1.5), "partial_rotary_factor"),
        (sized("smollm3", no_rope_layers=[1, 1]), "no_rope_layers"),
        (sized("gemma2", hidden_act="silu"), "hidden_act"),
        (sized("gemma2", sliding_window_size=7), "sliding_window_size"),
        (sized("granite", logits_scaling=0), "logits_scaling"),
    ],
)
def test_damaged_numbers_are_named(config: dict[str, Any], names: str) -> None:
    with pytest.raises(CorruptModel, match=names):
        architecture(config)


@pytest.mark.parametrize(
    "bad", [None, -1, 0, 1e400, 10**400, 1, "x", [], {}, [None], {"a": 1}, True], ids=lambda bad: repr(bad)[:9]
)
def test_no_bad_value_escapes_as_a_bare_exception(bad: object) -> None:
    refused = 0
    for name in MODELS:
        config = json.loads((FOLDER / name / "config.json").read_text())
        for key in config:
            try:
                architecture({**config, key: bad})
            except ModelError:
                refused += 1
    assert refused > len(MODELS)
