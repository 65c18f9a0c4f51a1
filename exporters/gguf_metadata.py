"""GGUF metadata read as a Hugging Face configuration, and from it the :class:`Architecture`.

The keys and what they mean are llama.cpp's: ``gguf-py/gguf/constants.py`` for the names, the converters
(``conversion/*.py``) for what is written, ``src/llama-model.cpp`` for defaults of what is not. A key under the
architecture's own prefix that is not read here is refused, because it may change the arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import CorruptModel, ModelError, UnsupportedModel
from exporters.architecture import Architecture, Layer
from exporters.families import architecture
from exporters.fields import Fields
from exporters.gguf_blocks import decode
from exporters.gguf_file import GgufFile
from exporters.weights import dequantize

Config = dict[str, Any]

HARMLESS = frozenset(
    {
        "vocab_size",  # the embedding's rows decide
        "tensor_data_layout",  # says that Q and K are permuted, which they are in this architecture anyway
        "expert_used_count",  # of no experts
    }
)
FLOAT32_MAX = float(np.finfo(np.float32).max)
PER_LAYER = ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
"""Fields that may be a list with one value per layer; only equal values are run."""


@dataclass(frozen=True)
class GgufFamily:
    """What one ``general.architecture`` does differently."""

    model_type: str
    extras: Callable[[Fields, Config], None] = lambda keys, config: None
    """Adds the family's own fields to the configuration."""
    biases: tuple[str, ...] = ()
    """Configuration fields that a bias tensor switches on."""
    permuted: bool = False
    """Rows of Q and K are stored as pairs (2i, 2i+1) where Transformers has (i, i + head_dim/2)."""
    partial_rotary: bool = False
    must_be: Mapping[str, tuple[object, str]] = field(default_factory=dict)


def family_of(metadata: Mapping[str, Any]) -> GgufFamily:
    """The row of :data:`FAMILIES`. UnsupportedModel names another architecture or kind of file."""
    kind = metadata.get("general.type", "model")
    if not isinstance(kind, str) or kind != "model":
        raise UnsupportedModel(f"general.type is {kind!r}: the file is no language model of its own")
    parts = metadata.get("split.count", 0)
    if not isinstance(parts, int) or parts > 1:
        raise UnsupportedModel(
            f"split.count is {parts}: the model is split over several files, which is not read. "
            "Join them first: llama-gguf-split --merge FIRST_PART OUTPUT"
        )
    name = metadata.get("general.architecture")
    if not isinstance(name, str):
        raise CorruptModel(f"general.architecture must be a string, not {name!r}")
    if name not in FAMILIES:
        raise UnsupportedModel(f"GGUF architecture {name!r} is not supported; supported: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[name]


def read_architecture(file: GgufFile) -> Architecture:
    """The arithmetic of the file. Raises CorruptModel or UnsupportedModel, which name the field."""
    family = family_of(file.metadata)
    config = to_config(file, family)
    try:
        made = architecture(config)
    except ModelError as error:
        raise type(error)(f"{file.path.name}, its metadata read as a configuration: {error}") from error
    except (ArithmeticError, ValueError) as error:  # numbers far outside what any model has
        raise CorruptModel(f"{file.path.name}: the metadata's numbers make no model: {error}") from error
    if made.qkv_bias and "attention_bias" in config:  # one field in a config.json, two questions in a GGUF
        made = replace(made, o_bias=_has(file, "attn_output.bias"))
    return _with_rope_freqs(made, file)


def to_config(file: GgufFile, family: GgufFamily) -> Config:
    """The file's metadata under the names of a ``config.json``."""
    prefix = f"{file.metadata['general.architecture']}."
    values = {key.removeprefix(prefix): _plain(value) for key, value in file.metadata.items() if key.startswith(prefix)}
    keys = Fields(_uniform(values, prefix), f"{file.path.name}, {prefix}*")
    hidden, heads = keys.integer("embedding_length"), keys.integer("attention.head_count")
    head_dim = keys.integer("attention.key_length", max(hidden // heads, 1))
    config: Config = {
        "model_type": family.model_type,
        "vocab_size": _shape(file, "token_embd.weight")[0],
        "hidden_size": hidden,
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": keys.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": keys.integer("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon", above=0),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rope_theta": keys.number("rope.freq_base", 10_000.0),
    }
    _check_sizes(file, config)
    _rotary(keys, config, family, head_dim)
    _scaling(keys, config, file)
    if "attention_bias" in family.biases:
        config["attention_bias"] = _has(file, "attn_q.bias") or _has(file, "attn_qkv.bias")
    if "mlp_bias" in family.biases:
        config["mlp_bias"] = _has(file, "ffn_gate.bias")
    family.extras(keys, config)
    common = {
        "attention.value_length": (head_dim, "keys and values have the same size"),
        "attention.causal": (True, "attention is causal"),
        "expert_count": (0, "experts are not run"),
        "attention.max_alibi_bias": (0.0, "positions are rotary"),
        "attention.clamp_kqv": (0.0, "nothing is clamped"),
        "use_parallel_residual": (False, "blocks run one after the other"),
        "nextn_predict_layers": (0, "layers that predict further tokens are not run"),
    }
    for name, (value, why) in {**common, **family.must_be}.items():
        keys.must_be(name, value, why)
    if unknown := keys.unread(HARMLESS | ({"rope.scaling.finetuned"} - family.must_be.keys())):
        raise UnsupportedModel(
            f"{file.path.name}: unknown metadata {', '.join(prefix + name for name in unknown)}; it may change the "
            "arithmetic, so the model is not run without knowing it"
        )
    return config


def _plain(value: Any) -> Any:
    """Python values; a float32 as the decimal that the converter was probably given."""
    if isinstance(value, np.ndarray):
        return [_plain(item) for item in value.tolist()]
    return shortest(value) if isinstance(value, float) else value


def shortest(value: float) -> float:
    """The shortest decimal that is this float32: 0.1 for 0.10000000149011612. Other numbers stay."""
    if not abs(value) <= FLOAT32_MAX or float(np.float32(value)) != value:
        return value
    return float(str(np.float32(value)))


def _uniform(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    made = dict(values)
    for name in PER_LAYER:
        items = made.get(name)
        if isinstance(items, list):
            if not items or any(item != items[0] for item in items):
                raise UnsupportedModel(f"{prefix}{name} differs from layer to layer, which is not run")
            made[name] = items[0]
    return made


def _check_sizes(file: GgufFile, config: Config) -> None:
    """Hold the sizes to tensors that the file does contain, before anything of such a size is made."""
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    stored = _shape(file, "token_embd.weight")
    if stored[1:] != (hidden,):
        raise CorruptModel(f"{file.path.name}: token_embd.weight is {stored}, embedding_length is {hidden}")
    if layers > len(file.tensors):
        raise CorruptModel(f"{file.path.name}: block_count is {layers}, but there are {len(file.tensors)} tensors")
    fused = "blk.0.attn_qkv.weight" in file.tensors
    heads = config["num_attention_heads"] + (2 * config["num_key_value_heads"] if fused else 0)
    name = f"blk.0.{'attn_qkv' if fused else 'attn_q'}.weight"
    wanted = (heads * config["head_dim"], hidden)
    if _shape(file, name) != wanted:
        raise CorruptModel(f"{file.path.name}: {name} is {_shape(file, name)}; the metadata asks for {wanted}")


def _rotary(keys: Fields, config: Config, family: GgufFamily, head_dim: int) -> None:
    rotary = keys.integer("rope.dimension_count", head_dim)
    if family.partial_rotary or rotary != head_dim:
        config["partial_rotary_factor"] = rotary / head_dim
        if int(head_dim * config["partial_rotary_factor"]) != rotary:  # the division rounded down
            config["partial_rotary_factor"] = math.nextafter(rotary / head_dim, math.inf)


def _scaling(keys: Fields, config: Config, file: GgufFile) -> None:
    """``rope_scaling`` from the scaling keys and the factor tensors."""
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 0.0))  # 0: not scaled
    kind = keys.text("rope.scaling.type", "linear" if factor else "none")
    if keys.has("rope.scaling.original_context_length"):
        config["original_max_position_embeddings"] = keys.integer("rope.scaling.original_context_length")
    long, short = (_factors(file, f"rope_factors_{name}.weight") for name in ("long", "short"))
    if (long is None) != (short is None):
        raise CorruptModel(f"{file.path.name}: only one of rope_factors_long and rope_factors_short is there")
    if long is not None and short is not None:
        scaling = {"rope_type": "longrope", "long_factor": long.tolist(), "short_factor": short.tolist()}
        config["rope_scaling"] = {**scaling, **_longrope_scale(keys, config)}
        return
    keys.must_be("rope.scaling.attn_factor", 1.0, "only longrope has such a factor")
    if kind == "linear" and factor:
        config["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        config["rope_scaling"] = {"rope_type": "yarn", "factor": factor}
        for name in ("beta_fast", "beta_slow"):
            if keys.has(f"rope.scaling.yarn_{name}"):
                config["rope_scaling"][name] = keys.number(f"rope.scaling.yarn_{name}")
        # the converter writes Transformers' whole factor here, llama.cpp multiplies by it: only 1 means one thing
        keys.must_be("rope.scaling.yarn_attn_factor", 1.0, "converters and llama.cpp mean different things by it")
        keys.must_be("rope.scaling.yarn_ext_factor", 1.0, "the ramp is not weakened")
    elif kind not in ("none", "linear"):
        raise UnsupportedModel(f"{file.path.name}: rope.scaling.type {kind!r} is not supported (none, linear, yarn)")


def _longrope_scale(keys: Fields, config: Config) -> Config:
    """The factor on cos and sin, unless it is the one that follows from the lengths."""
    stored = keys.number("rope.scaling.attn_factor", 1.0, above=0)
    longest: int = config["max_position_embeddings"]
    original: int = config.get("original_max_position_embeddings", longest)
    stretch = longest / original
    natural = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 and original > 1 else 1.0
    return {} if math.isclose(stored, natural, rel_tol=1e-6) else {"attention_factor": stored}


def _with_rope_freqs(arch: Architecture, file: GgufFile) -> Architecture:
    """Divide the frequencies by ``rope_freqs.weight``, as which converters store Llama 3's scaling."""
    factors = _factors(file, "rope_freqs.weight")
    if factors is None:
        return arch
    if arch.rope_switch is not None or arch.family.startswith("gemma"):
        raise UnsupportedModel(f"{file.path.name}: rope_freqs.weight is not supported in this family")
    return replace(arch, layers=tuple(_divided(layer, factors, file) for layer in arch.layers))


def _divided(layer: Layer, factors: NDArray[np.float64], file: GgufFile) -> Layer:
    if layer.rope is None:
        return layer
    inv_freq = np.asarray(layer.rope.inv_freq)
    if inv_freq.shape != factors.shape:
        raise CorruptModel(f"{file.path.name}: rope_freqs.weight has {factors.size} values, not {inv_freq.size}")
    return replace(layer, rope=replace(layer.rope, inv_freq=tuple((inv_freq / factors).tolist())))


def _factors(file: GgufFile, name: str) -> NDArray[np.float64] | None:
    info = file.tensors.get(name)
    if info is None:
        return None
    if len(info.shape) != 1:
        raise CorruptModel(f"{file.path.name}: {name} is {info.shape}, not a list")
    values: NDArray[np.float64] = dequantize(decode(file.rows(info, 0, 1), info.kind, name))[0].astype(np.float64)
    if (values <= 0).any():
        raise CorruptModel(f"{file.path.name}: {name} holds a factor that is not positive")
    return values


def _has(file: GgufFile, suffix: str) -> bool:
    return f"blk.0.{suffix}" in file.tensors


def _shape(file: GgufFile, name: str) -> tuple[int, ...]:
    if name not in file.tensors:
        raise CorruptModel(f"{file.path.name} has no tensor {name!r}")
    return file.tensors[name].shape


# ---- families


def _granite(keys: Fields, config: Config) -> None:
    config["attention_multiplier"] = keys.number("attention.scale", config["head_dim"] ** -0.5)
    config["embedding_multiplier"] = keys.number("embedding_scale", 1.0)
    config["residual_multiplier"] = keys.number("residual_scale", 1.0)
    config["logits_scaling"] = keys.number("logit_scale")


def _phi3(keys: Fields, config: Config) -> None:
    # 0 is written for a configuration without a window; llama.cpp ignores the window, Transformers does not
    config["sliding_window"] = keys.integer("attention.sliding_window", 0, minimum=0) or None


def _gemma(largest: int) -> Callable[[Fields, Config], None]:
    """The query scale is not stored: llama.cpp knows it by the number of layers of the largest model."""

    def extras(keys: Fields, config: Config) -> None:
        per_head = config["hidden_size"] // config["num_attention_heads"]
        is_largest = config["num_hidden_layers"] == largest
        config["query_pre_attn_scalar"] = per_head if is_largest else config["head_dim"]
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            if keys.has(name):
                config[name] = keys.number(name, above=0)

    return extras


def _gemma2(keys: Fields, config: Config) -> None:
    _gemma(46)(keys, config)
    config["sliding_window"] = keys.integer("attention.sliding_window")
    keys.must_be("attention.sliding_window_pattern", 2, "every other layer has a window")


def _gemma3(keys: Fields, config: Config) -> None:
    _gemma(62)(keys, config)
    config["rope_local_base_freq"] = keys.number("rope.freq_base_swa", 10_000.0)
    layers = config["num_hidden_layers"]
    if keys.has("attention.sliding_window"):
        config["sliding_window"] = keys.integer("attention.sliding_window")
        config["sliding_window_pattern"] = keys.integer("attention.sliding_window_pattern", 6)
    else:  # written when every layer sees everything
        config["layer_types"] = ["full_attention"] * layers


def _smollm3(keys: Fields, config: Config) -> None:
    config["no_rope_layer_interval"] = 4  # n_no_rope_layer_step; not stored


_LLAMA = GgufFamily("llama", biases=("attention_bias", "mlp_bias"), permuted=True)
_GLM = GgufFamily("glm", biases=("attention_bias",), partial_rotary=True)

FAMILIES: Mapping[str, GgufFamily] = {
    "llama": _LLAMA,
    "qwen2": GgufFamily("qwen2"),
    "qwen3": GgufFamily("qwen3", biases=("attention_bias",)),
    "chatglm": _GLM,
    "glm4": replace(_GLM, model_type="glm4"),
    "phi3": GgufFamily("phi3", _phi3, partial_rotary=True),
    "gemma2": GgufFamily("gemma2", _gemma2),
    "gemma3": GgufFamily("gemma3_text", _gemma3),
    "granite": replace(
        _LLAMA,
        model_type="granite",
        extras=_granite,
        must_be={"rope.scaling.finetuned": (True, "llama.cpp takes false as: no rotation at all")},
    ),
    "smollm3": replace(_LLAMA, model_type="smollm3", extras=_smollm3),
}
