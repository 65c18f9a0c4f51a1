"""Model families as rows of differences, and a Hugging Face ``config.json`` turned into an :class:`Architecture`.

Field names and defaults are those of Transformers' configuration classes (5.x); both the older layout
(``rope_theta`` + ``rope_scaling``) and the newer one (``rope_parameters``, possibly per layer type) are read.
A field that nobody here reads and that is not known to be harmless is refused by name, because it may change
the arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from edge_runtime.errors import CorruptModel, UnsupportedModel
from exporters import layer_windows
from exporters.architecture import Activation, Architecture, Layer, Rope
from exporters.fields import Fields
from exporters.layer_windows import FULL, SLIDING
from exporters.rope import RopeRow, read_ropes

ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}

MAX_HEAD_DIM = 1 << 16
MAX_POSITIONS = 2**21
"""Tables of cosines are made by these two, before any weight has shown whether the configuration is true. No model in
use has a hundredth of the first, or more positions than half of the second."""

HARMLESS = frozenset(
    name
    for names in (
        # identity and bookkeeping
        "_attn_implementation _attn_implementation_autoset _name_or_path architectures auto_map dtype name_or_path",
        "torch_dtype transformers_version unsloth_fixed unsloth_version transformers.js_config is_llama_config",
        "bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id decoder_start_token_id tokenizer_class",
        # training only
        "attention_dropout embd_pdrop hidden_dropout initializer_range resid_pdrop gradient_checkpointing",
        # how Transformers runs or splits it, not what it computes
        "cache_implementation output_attentions output_hidden_states pretraining_tp return_dict torchscript use_cache",
        "is_decoder use_return_dict",
        # heads of other tasks
        "finetuning_task id2label label2id problem_type task_specific_params prefix",
        # generation defaults that old checkpoints carry in config.json
        "bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length min_length",
        "no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores remove_invalid_values",
        "repetition_penalty return_dict_in_generate suppress_tokens temperature top_k top_p typical_p",
    )
    for name in names.split()
)

MUST_BE: Mapping[str, tuple[object, str]] = {
    "add_cross_attention": (False, "there is no encoder"),
    "chunk_size_feed_forward": (0, "the MLP runs whole"),
    "is_encoder_decoder": (False, "there is no encoder"),
    "pruned_heads": ({}, "all heads are computed"),
    "rope_interleaved": (False, "the family's pairing of channels is fixed"),
    "tie_encoder_decoder": (False, "there is no encoder"),
    "use_bidirectional_attention": (False, "attention is causal"),
}


Bias = bool | tuple[str, bool]
"""A constant, or the configuration field that says so and its default."""


@dataclass(frozen=True)
class Biases:
    """Which linear layers have one."""

    qkv: Bias = False
    o: Bias = False
    mlp: Bias = False


@dataclass(frozen=True)
class Family:
    """What one ``model_type`` does differently from Llama."""

    biases: Biases = field(default_factory=Biases)
    windows: layer_windows.Windows = layer_windows.no_windows
    kv_heads: int | None = None
    """Default of ``num_key_value_heads``; None: as many as heads."""
    head_dim: int | None = None
    """Default of ``head_dim``; None: hidden size / heads."""
    max_context: int = 2048
    norm_eps: float = 1e-6
    tied_head: bool = False
    activation_field: str = "hidden_act"
    activation: str = "silu"
    rope: RopeRow = field(default_factory=RopeRow)
    qk_norm: bool = False
    post_norms: bool = False
    scale_embedding: bool = False
    """Embeddings times sqrt(hidden) (Gemma). Transformers rounds the factor to the weights' type; here float32."""
    norm_offset: float = 0.0
    """Added to stored norm weights (Gemma stores w of ``1 + w``)."""
    softcaps: tuple[float | None, float | None] | None = None
    """Defaults of attn_logit_softcapping and final_logit_softcapping; None: the family has no such fields."""
    query_scalar: float | None = None
    """Default of ``query_pre_attn_scalar``; None: scores are scaled by head_dim ** -0.5."""
    multipliers: bool = False
    """Granite's four factors."""
    rope_layers: bool = False
    """SmolLM3: ``no_rope_layers`` (1 = rotated) or every fourth layer without."""
    must_be: Mapping[str, tuple[object, str]] = field(default_factory=dict)
    harmless: frozenset[str] = frozenset()
    tensors: Mapping[str, str] = field(default_factory=dict)
    """Canonical leaf → name below ``model.layers.{i}.`` where it is not Llama's (see :mod:`exporters.hf_names`)."""


def architecture(config: Mapping[str, Any]) -> Architecture:
    """The arithmetic that a Hugging Face ``config.json`` describes.

    UnsupportedModel names an unknown family, rope type, activation or field; CorruptModel a number that is
    missing, mistyped or contradicts another. The mapping is not changed.
    """
    name = config.get("model_type")
    if not isinstance(name, str):
        raise CorruptModel(f"config.json: model_type must be a string, not {name!r}")
    family = family_of(name)
    fields = Fields({key: value for key, value in config.items() if key != "model_type"}, f"config.json ({name})")

    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    kv_heads = fields.integer("num_key_value_heads", family.kv_heads or heads)
    if heads % kv_heads:
        raise CorruptModel(f"config.json ({name}): {heads} heads cannot share {kv_heads} key-value heads evenly")
    if not fields.has("head_dim") and family.head_dim is None and hidden % heads:
        raise CorruptModel(f"config.json ({name}): hidden_size {hidden} is not a multiple of {heads} heads")
    head_dim = fields.integer("head_dim", family.head_dim or max(hidden // heads, 1), maximum=MAX_HEAD_DIM)
    count = fields.integer("num_hidden_layers", maximum=10_000)
    max_context = fields.integer("max_position_embeddings", family.max_context, maximum=MAX_POSITIONS)

    ropes, rope_switch = read_ropes(fields, family.rope, head_dim, max_context)
    layers = _layers(fields, family, count, ropes)
    attention_cap, logit_cap = _softcaps(fields, family)
    made = Architecture(
        family=name,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_context=max_context,
        norm_eps=fields.number("rms_norm_eps", family.norm_eps, above=0),
        layers=layers,
        attention_scale=_attention_scale(fields, family, head_dim),
        activation=_activation(fields, family),
        tied_head=fields.boolean("tie_word_embeddings", family.tied_head),
        qkv_bias=_bias(fields, family.biases.qkv),
        o_bias=_bias(fields, family.biases.o),
        mlp_bias=_bias(fields, family.biases.mlp),
        down_bias=_bias(fields, family.biases.mlp),
        qk_norm=family.qk_norm,
        post_norms=family.post_norms,
        embedding_scale=_multiplier(fields, family, "embedding_multiplier", hidden),
        residual_scale=_multiplier(fields, family, "residual_multiplier", hidden),
        logit_scale=1.0 / _multiplier(fields, family, "logits_scaling", hidden),
        attention_softcap=attention_cap,
        logit_softcap=logit_cap,
        rope_switch=rope_switch,
    )
    for key, (value, why) in {**MUST_BE, **family.must_be}.items():
        fields.must_be(key, value, why)
    if unknown := fields.unread(HARMLESS | family.harmless):
        raise UnsupportedModel(
            f"config.json ({name}): unknown field {', '.join(unknown)}; it may change the arithmetic, "
            "so the model is not run without knowing it"
        )
    return made


def family_of(model_type: str) -> Family:
    family = FAMILIES.get(model_type)
    if family is None:
        raise UnsupportedModel(
            f"model family {model_type!r} is not supported; supported: {', '.join(sorted(FAMILIES))}"
        )
    return family


# ---- layers


def _layers(fields: Fields, family: Family, count: int, ropes: Mapping[str, Rope]) -> tuple[Layer, ...]:
    windows = family.windows(fields, count)
    rotated: tuple[int, ...] = (1,) * count
    if family.rope_layers:
        interval = fields.integer("no_rope_layer_interval", 4)
        rotated = tuple(int((index + 1) % interval != 0) for index in range(count))
        if fields.has("no_rope_layers"):
            rotated = fields.integers("no_rope_layers", count)
    layers = []
    for window, rope in zip(windows, rotated, strict=True):
        kind = FULL if window is None else SLIDING
        if rope and kind not in ropes:
            raise CorruptModel(f"config.json: rope_parameters has no {kind}, which some layers use")
        layers.append(Layer(ropes[kind] if rope else None, window))
    return tuple(layers)


# ---- scalars


def _bias(fields: Fields, source: Bias) -> bool:
    return source if isinstance(source, bool) else fields.boolean(*source)


def _activation(fields: Fields, family: Family) -> Activation:
    name = fields.text(family.activation_field, family.activation)
    made = ACTIVATIONS.get(name)
    if made is None:
        raise UnsupportedModel(f"activation {name!r} is not supported; supported: {', '.join(sorted(ACTIVATIONS))}")
    if family.activation_field != "hidden_act" and ACTIVATIONS.get(fields.text("hidden_act", name)) != made:
        raise CorruptModel(
            f"config.json: {family.activation_field} {name!r} contradicts hidden_act {fields.text('hidden_act')!r}"
        )
    return made


def _attention_scale(fields: Fields, family: Family, head_dim: int) -> float:
    if family.multipliers:
        return fields.number("attention_multiplier", 1.0, above=0)
    if family.query_scalar is not None:
        return float(fields.number("query_pre_attn_scalar", family.query_scalar, above=0) ** -0.5)
    return float(head_dim**-0.5)


def _multiplier(fields: Fields, family: Family, name: str, hidden: int) -> float:
    if family.multipliers:
        return fields.number(name, 1.0, above=0)
    return float(hidden**0.5) if family.scale_embedding and name == "embedding_multiplier" else 1.0


def _softcaps(fields: Fields, family: Family) -> tuple[float | None, float | None]:
    if family.softcaps is None:
        return None, None
    attention, final = family.softcaps
    return _cap(fields, "attn_logit_softcapping", attention), _cap(fields, "final_logit_softcapping", final)


def _cap(fields: Fields, name: str, default: float | None) -> float | None:
    if fields.has(name):
        return fields.number(name, above=0)
    return None if fields.given(name) else default


# ---- the rows

_ATTENTION_BIAS = ("attention_bias", False)
_MLP_BIAS = ("mlp_bias", False)
_NO_BIAS = {
    "attention_bias": (False, "the family has no such bias"),
    "mlp_bias": (False, "the family has no such bias"),
}

_GLM = Family(
    biases=Biases(qkv=("attention_bias", True)),
    kv_heads=2,
    head_dim=128,
    max_context=131072,
    norm_eps=1.5625e-07,
    rope=RopeRow(partial=0.5, interleaved=True),
    must_be={"mlp_bias": (False, "the family has no such bias")},
    tensors={"gate": "mlp.gate_up_proj", "up": "mlp.gate_up_proj"},
)
_QWEN2 = Family(
    biases=Biases(qkv=True),
    windows=layer_windows.qwen,
    max_context=32768,
    must_be={
        "attention_bias": (True, "the family always has biases on q, k and v"),
        "mlp_bias": (False, "the family has no such bias"),
        "use_mrope": (False, "positions are those of text"),
    },
)
_GEMMA2 = Family(
    biases=Biases(qkv=_ATTENTION_BIAS, o=_ATTENTION_BIAS),
    windows=layer_windows.gemma(2, pattern_field=False),
    kv_heads=4,
    head_dim=256,
    max_context=8192,
    tied_head=True,
    activation_field="hidden_activation",
    activation="gelu_pytorch_tanh",
    post_norms=True,
    scale_embedding=True,
    norm_offset=1.0,
    softcaps=(50.0, 30.0),
    query_scalar=256.0,
    tensors={
        "attn_post_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    },
)
_LLAMA = Family(biases=Biases(_ATTENTION_BIAS, _ATTENTION_BIAS, _MLP_BIAS))

FAMILIES: Mapping[str, Family] = {
    "llama": _LLAMA,
    "mistral": Family(windows=layer_windows.every_layer(4096), kv_heads=8, max_context=131072, must_be=_NO_BIAS),
    "qwen2": _QWEN2,
    "qwen3": replace(_QWEN2, biases=Biases(_ATTENTION_BIAS, _ATTENTION_BIAS), head_dim=128, qk_norm=True, must_be={}),
    "glm": _GLM,
    "glm4": replace(
        _GLM,
        post_norms=True,
        tensors={
            **_GLM.tensors,
            "attn_post_norm": "post_self_attn_layernorm",
            "mlp_post_norm": "post_mlp_layernorm",
        },
    ),
    "phi3": Family(
        windows=layer_windows.every_layer(None),
        max_context=4096,
        norm_eps=1e-5,
        # the aliases are names that earlier releases of the same checkpoints gave to longrope
        rope=RopeRow(partial=1.0, original_context=4096, aliases={"su": "longrope", "yarn": "longrope"}),
        must_be={
            **_NO_BIAS,
            "lm_head_bias": (False, "the head has no bias"),
            "full_attn_mod": (1, "every layer attends alike"),
            "interpolate_factor": (1, "positions are counted one by one"),
        },
        tensors={
            **dict.fromkeys(("q", "k", "v"), "self_attn.qkv_proj"),
            **dict.fromkeys(("gate", "up"), "mlp.gate_up_proj"),
        },
    ),
    "gemma2": _GEMMA2,
    "gemma3_text": replace(
        _GEMMA2,
        windows=layer_windows.gemma(6, pattern_field=True),
        max_context=131072,
        rope=RopeRow(theta=1_000_000.0, local_theta=10_000.0),
        qk_norm=True,
        softcaps=(None, None),
        # Transformers reads this field but does not apply it, so a value would have two meanings
        must_be={"attn_logit_softcapping": (None, "Gemma 3 caps no scores")},
    ),
    "granite": replace(_LLAMA, multipliers=True),
    "smollm3": replace(
        _LLAMA,
        windows=layer_windows.smollm3,
        kv_heads=4,
        max_context=32768,
        tied_head=True,
        rope=RopeRow(theta=2_000_000.0),
        rope_layers=True,
        harmless=frozenset({"max_window_layers"}),
    ),
}
