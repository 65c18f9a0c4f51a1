"""Tiny GGUF models with random weights, laid out as llama.cpp's converters do (its ``conversion/*.py``)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType
from numpy.typing import NDArray

from exporters.architecture import Architecture
from exporters.families import architecture
from exporters.hf_names import tensor_shape
from exporters.network import tensor_names

Arrays = dict[str, NDArray[np.float32]]
Extras = Callable[[gguf.GGUFWriter, dict[str, Any], Arrays], None]

ARCHITECTURES = {"mistral": "llama", "glm": "chatglm", "gemma3_text": "gemma3"}
"""``general.architecture`` where it is not the ``model_type``."""
LEAVES = {
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "attn_post_norm": "post_attention_norm",
    "mlp_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
    "mlp_post_norm": "post_ffw_norm",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "attn_norm": "attn_norm",
}


def random_tensors(arch: Architecture, seed: int = 0) -> Arrays:
    """Every canonical tensor of ``arch``."""
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(tensor_shape(arch, name)).astype(np.float32) for name in tensor_names(arch)}


def permute(weights: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """``LlamaModel.permute``."""
    shape = weights.shape
    return weights.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def write_model(
    path: Path,
    config: Mapping[str, Any],
    tensors: Arrays,
    *,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    extra: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    fuse_qkv: bool = False,
) -> None:
    """Write ``tensors`` (canonical) of the model that ``config`` (a config.json) describes. ``kind``: of matrices."""
    config = dict(config)
    writer = gguf.GGUFWriter(path, ARCHITECTURES.get(config["model_type"], config["model_type"]))
    extras: Arrays = {}
    _metadata(writer, config, extras)
    FAMILIES.get(config["model_type"], lambda *args: None)(writer, config, extras)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    # an empty list of merges would not be written
    writer.add_token_list(["t", "1", *(f"t{index}" for index in range(1, config["vocab_size"] - 1))])
    writer.add_token_merges(["t 1"])
    extra(writer)
    stored = _stored(config, tensors, fuse_qkv or config["model_type"] == "phi3")
    for name, values in {**stored, **extras}.items():
        if values.ndim == 2 and kind != GGMLQuantizationType.F32:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _metadata(writer: gguf.GGUFWriter, config: dict[str, Any], extras: Arrays) -> None:
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim", config["hidden_size"] // heads)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if "head_dim" in config:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    scaling = scaling.get("full_attention", scaling)
    writer.add_rope_freq_base(config.get("rope_theta", scaling.get("rope_theta", 10000.0)))
    share = config.get("partial_rotary_factor", scaling.get("partial_rotary_factor", 1.0))
    writer.add_rope_dimension_count(int(head_dim * share))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling["factor"])
    elif kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(scaling["factor"])
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
    elif kind == "llama3":
        extras["rope_freqs.weight"] = _llama3_factors(scaling, head_dim)


def _llama3_factors(scaling: Mapping[str, Any], dim: int) -> NDArray[np.float32]:
    """``LlamaModel.generate_extra_tensors``."""
    factors = []
    low = scaling["original_max_position_embeddings"] / scaling["low_freq_factor"]
    high = scaling["original_max_position_embeddings"] / scaling["high_freq_factor"]
    for index in range(0, dim, 2):
        wave = 2 * math.pi * scaling["rope_theta"] ** (index / dim)
        smooth = (scaling["original_max_position_embeddings"] / wave - scaling["low_freq_factor"]) / (
            scaling["high_freq_factor"] - scaling["low_freq_factor"]
        )
        between = 1 / ((1 - smooth) / scaling["factor"] + smooth)
        factors.append(1.0 if wave < high else scaling["factor"] if wave > low else between)
    return np.array(factors, np.float32)


def _granite(writer: gguf.GGUFWriter, config: dict[str, Any], extras: Arrays) -> None:
    writer.add_attention_scale(config["attention_multiplier"])
    writer.add_embedding_scale(config["embedding_multiplier"])
    writer.add_residual_scale(config["residual_multiplier"])
    writer.add_logit_scale(config["logits_scaling"])


def _gemma2(writer: gguf.GGUFWriter, config: dict[str, Any], extras: Arrays) -> None:
    writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    writer.add_sliding_window(config["sliding_window"])


def _gemma3(writer: gguf.GGUFWriter, config: dict[str, Any], extras: Arrays) -> None:
    local = config.get("rope_parameters", {}).get("sliding_attention", {}).get("rope_theta")
    if local is not None:
        writer.add_rope_freq_base_swa(local)
    writer.add_sliding_window(config["sliding_window"])
    if "sliding_window_pattern" in config:
        writer.add_sliding_window_pattern(config["sliding_window_pattern"])


def _phi3(writer: gguf.GGUFWriter, config: dict[str, Any], extras: Arrays) -> None:
    original = config.get("original_max_position_embeddings", 4096)
    writer.add_rope_scaling_orig_ctx_len(original)
    writer.add_sliding_window(config.get("sliding_window") or 0)
    scaling = config.get("rope_scaling")
    if scaling:
        stretch = config["max_position_embeddings"] / original
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(stretch) / math.log(original)))
        extras["rope_factors_long.weight"] = np.array(scaling["long_factor"], np.float32)
        extras["rope_factors_short.weight"] = np.array(scaling["short_factor"], np.float32)


FAMILIES: Mapping[str, Extras] = {"granite": _granite, "gemma2": _gemma2, "gemma3_text": _gemma3, "phi3": _phi3}


def _stored(config: Mapping[str, Any], tensors: Arrays, fuse_qkv: bool) -> Arrays:
    """The file's tensors: permuted and fused."""
    kind = config["model_type"]
    arch = architecture(config)
    made: Arrays = {}
    for name, values in tensors.items():
        if not name.startswith("layers."):
            outer = {"embed": "token_embd", "norm": "output_norm", "head": "output"}
            made[f"{outer[name]}.weight"] = values
            continue
        _, index, leaf = name.split(".", 2)
        base, _, bias = leaf.partition(".")
        if kind in ("llama", "mistral", "granite", "smollm3") and base in ("q", "k"):
            values = permute(values, arch.num_heads if base == "q" else arch.num_kv_heads)
        made[f"blk.{index}.{LEAVES[base]}.{bias or 'weight'}"] = values
    if kind in ("glm", "glm4", "phi3"):
        _fuse(made, ("ffn_gate", "ffn_up"), "ffn_up")
    if fuse_qkv:
        _fuse(made, ("attn_q", "attn_k", "attn_v"), "attn_qkv")
    return made


def _fuse(made: Arrays, parts: tuple[str, ...], whole: str) -> None:
    for name in [name for name in made if f".{parts[0]}." in name]:
        made[name.replace(parts[0], whole)] = np.concatenate([made.pop(name.replace(parts[0], part)) for part in parts])
