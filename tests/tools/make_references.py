"""Makes tests/fixtures/families: one tiny seeded model per family and variant, with Transformers' fp32 logits.

Run by hand when a family is added, with torch and transformers installed beside the project's own packages::

    python tests/tools/make_references.py

Each folder holds ``config.json``, weights in mixed float32/float16/bfloat16 (one folder sharded) and
``reference.npz``: ``ids`` (72,), and per prefix length n the float32 logits ``logits_n`` (n, vocab) of one forward
over ids[:n], eager attention, on the rounded weights. The configurations are in the older and the newer layout.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

FOLDER = Path(__file__).parents[1] / "fixtures" / "families"
LENGTHS = (7, 24, 72)
SHARDED = "qwen2"
BASE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WIDE = {"hidden_size": 64, "head_dim": None}  # families whose head is always hidden / heads
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "rope_theta": 10000.0, "tie_word_embeddings": True},
    "llama-llama3": {
        "model_type": "llama",
        "tie_word_embeddings": False,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "llama-linear": {
        "model_type": "llama",
        "rope_theta": 5000.0,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "tie_word_embeddings": False,
    },
    "llama-yarn": {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "rope_theta": 10000.0,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        "tie_word_embeddings": True,
    },
    "mistral": {"model_type": "mistral", "sliding_window": 16, "rope_theta": 10000.0, "tie_word_embeddings": False},
    "qwen2": {
        "model_type": "qwen2",
        **WIDE,
        "rope_theta": 1000000.0,
        "use_sliding_window": False,
        "sliding_window": 16,
        "max_window_layers": 2,
        "tie_word_embeddings": True,
    },
    "qwen2-sliding": {
        "model_type": "qwen2",
        **WIDE,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "use_sliding_window": True,
        "sliding_window": 16,
        "max_window_layers": 1,
        "tie_word_embeddings": False,
    },
    "qwen3": {"model_type": "qwen3", "rope_theta": 1000000.0, "tie_word_embeddings": True},
    "glm": {
        "model_type": "glm",
        "head_dim": 32,
        "attention_bias": True,
        "partial_rotary_factor": 0.5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    },
    "glm-edge": {
        "model_type": "glm",
        "attention_bias": False,
        "partial_rotary_factor": 1.0,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    },
    "glm4": {
        "model_type": "glm4",
        "head_dim": 32,
        "attention_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        "tie_word_embeddings": False,
    },
    "phi3": {"model_type": "phi3", **WIDE, "num_hidden_layers": 2, "rope_theta": 10000.0, "sliding_window": 16},
    "phi3-longrope": {
        "model_type": "phi3",
        **WIDE,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "original_max_position_embeddings": 32,
        "partial_rotary_factor": 0.5,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
            "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0],
        },
        "tie_word_embeddings": True,
    },
    "gemma2": {
        "model_type": "gemma2",
        "num_hidden_layers": 4,
        "rope_theta": 10000.0,
        "sliding_window": 16,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 4.0,
        "final_logit_softcapping": 5.0,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 4,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "sliding_window": 16,
        "sliding_window_pattern": 3,
        "query_pre_attn_scalar": 24,
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
    },
    "gemma3-new": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 2,
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 50000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
        },
        "sliding_window": 16,
        "query_pre_attn_scalar": 16,
    },
    "granite": {
        "model_type": "granite",
        **WIDE,
        "num_hidden_layers": 2,
        "rope_theta": 10000.0,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.2,
        "logits_scaling": 2.0,
        "tie_word_embeddings": True,
    },
    "smollm3": {
        "model_type": "smollm3",
        **WIDE,
        "rope_theta": 50000.0,
        "no_rope_layers": [1, 0, 1],
        "use_sliding_window": True,
        "sliding_window": 16,
        "tie_word_embeddings": True,
    },
}


def random_weights(model: torch.nn.Module, seed: int, gemma: bool) -> dict[str, torch.Tensor]:
    """Scaled so that attention is peaked, logits spread, and every norm and bias matters."""
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, torch.Tensor] = {}
    for index, (name, value) in enumerate(model.named_parameters()):
        noise = torch.randn(value.shape, generator=generator)
        if name.endswith("norm.weight") or "layernorm" in name:
            weights[name] = 0.3 * noise + (0.0 if gemma else 1.0)
        elif name.endswith("bias"):
            weights[name] = 0.3 * noise
        elif "embed_tokens" in name:
            weights[name] = 0.4 * noise
        else:
            gain = 2.0 if any(part in name for part in ("q_proj", "k_proj", "qkv_proj")) else 1.0
            weights[name] = gain * noise / value.shape[-1] ** 0.5
        small = torch.float16 if index % 2 else torch.bfloat16
        weights[name] = weights[name].to(torch.float32 if value.dim() == 1 else small).contiguous()
    return weights


def save(folder: Path, weights: dict[str, torch.Tensor], sharded: bool) -> None:
    if not sharded:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(weights)
    parts = [names[: len(names) // 2], names[len(names) // 2 :]]
    weight_map = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def make(name: str, seed: int) -> None:
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = {key: value for key, value in {**BASE, **MODELS[name]}.items() if value is not None or key not in BASE}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    save(folder, random_weights(empty, seed, "gemma" in name), name == SHARDED)

    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    if any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        sys.exit(f"{name}: {report}")
    ids = np.random.default_rng(seed).integers(3, BASE["vocab_size"], max(LENGTHS))
    arrays = {"ids": ids.astype(np.int64)}
    for length in LENGTHS:
        with torch.no_grad():
            logits = model(torch.from_numpy(ids[None, :length]), use_cache=False).logits[0]
        arrays[f"logits_{length}"] = logits.numpy().astype(np.float32)
    np.savez_compressed(folder / "reference.npz", **arrays)
    spread = arrays[f"logits_{max(LENGTHS)}"]
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{name:16} logits std {spread.std():.2f} max {abs(spread).max():.1f}, {size / 1024:.0f} KiB")
    if spread.std() < 0.5:
        sys.exit(f"{name}: logits too flat for a test")


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for number, each in enumerate(MODELS):
        make(each, 100 + number)
