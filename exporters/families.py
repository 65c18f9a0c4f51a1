"""Model families as rows of differences, and a Hugging Face ``config.json`` turned into an :class:`Architecture`.

Field names and defaults are those of Transformers' configuration classes (5.x); both the older layout
(``rope_theta`` + ``rope_scaling``) and the newer one (``rope_parameters``, possibly per layer type) are read.
A field that nobody here reads and that is not known to be harmless is refused by name, because it may change
the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from edge_runtime.errors import CorruptModel, UnsupportedModel
from exporters.architecture import Activation, Architecture, Layer, Rope
from exporters.fields import Fields
from exporters.rope import RopeBase, make_rope

FULL, SLIDING = "full_attention", "sliding_attention"

ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}

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


Windows = Callable[[Fields, int], tuple[int | None, ...]]
"""(fields, layers) → the sliding window of each layer."""


def _no_windows(fields: Fields, layers: int) -> tuple[int | None, ...]:
    return (None,) * layers


@dataclass(frozen=True)
class Family:
    """What one ``model_type`` does differently from Llama."""

    biases: Biases = field(default_factory=Biases)
    windows: Windows = _no_windows
    kv_heads: int | None = None
    """Default of ``num_key_value_heads``; None: as many as heads."""
    head_dim: int | None = None
    """Default of ``head_dim``; None: hidden size / heads."""
    max_context: int = 2048
    norm_eps: float = 1e-6
    tied_head: bool = False
    activation_field: str = "hidden_act"
    activation: str = "silu"
    theta: float = 10_000.0
    local_theta: float | None = None
    """Default base of sliding layers when they have their own (Gemma 3)."""
    partial_rotary: float | None = None
    """Default share of a head that is rotated; None: always all of it."""
    interleaved: bool = False
    original_context: int | None = None
    """Default of ``original_max_position_embeddings``; None: the maximum context."""
    rope_aliases: Mapping[str, str] = field(default_factory=dict)
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
    head_dim = fields.integer("head_dim", family.head_dim or max(hidden // heads, 1))
    count = fields.integer("num_hidden_layers")
    max_context = fields.integer("max_position_embeddings", family.max_context)

    ropes, rope_switch = _ropes(fields, family, head_dim, max_context)
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


# ---- rotary embedding


def _ropes(fields: Fields, family: Family, head_dim: int, max_context: int) -> tuple[dict[str, Rope], int | None]:
    """The rotary embedding of each layer type, and the longrope switch."""
    if fields.has("rope_parameters") and fields.has("rope_scaling"):
        raise CorruptModel("config.json: both rope_parameters and rope_scaling are given; keep one")
    scaled = fields.mapping("rope_scaling")
    params = fields.mapping("rope_parameters") or scaled
    nested = {key: params[key] for key in (FULL, SLIDING) if isinstance(params.get(key), Mapping)}
    if unknown := sorted(set(params) - set(nested)) if nested else []:
        raise UnsupportedModel(f"config.json: rope_parameters has {', '.join(unknown)} beside its layer types")
    per_type: Mapping[str, Mapping[str, Any]] = nested or {FULL: params, SLIDING: params}
    if family.local_theta is not None:
        if params and not nested and not scaled:
            raise UnsupportedModel("config.json: rope_parameters must name its layer types in this family")
        # Gemma 3: a scaling is for the global layers, local ones have a plain base of their own
        local = fields.number("rope_local_base_freq", family.local_theta, above=0)
        per_type = {SLIDING: {"rope_theta": local}, FULL: params} if not nested else {SLIDING: {}, **nested}
    ropes: dict[str, Rope] = {}
    switches: set[int] = set()
    for layer_type, values in per_type.items():
        theta = family.local_theta if layer_type == SLIDING and family.local_theta else None
        ropes[layer_type], switch = _rope(fields, family, values, theta, head_dim, max_context)
        switches |= {switch} if switch else set()
    if len(switches) > 1:
        raise UnsupportedModel(f"config.json: layer types switch to long factors at different lengths {switches}")
    return ropes, switches.pop() if switches else None


def _rope(
    fields: Fields, family: Family, values: Mapping[str, Any], local: float | None, head_dim: int, max_context: int
) -> tuple[Rope, int | None]:
    params = Fields(values, "config.json, rope parameters")
    rope_type = params.text("type", "default") if not params.has("rope_type") else params.text("rope_type")
    if params.has("type") and params.text("type") != rope_type:
        raise CorruptModel(f"config.json: rope type {rope_type!r} contradicts {params.text('type')!r}")
    rope_type = family.rope_aliases.get(rope_type, rope_type)
    theta = params.number("rope_theta", local or fields.number("rope_theta", family.theta))
    if theta <= 1:
        raise fields.wrong("rope_theta", theta, "a number above 1")
    if local is None and params.has("rope_theta"):
        _agree(fields, "rope_theta", theta)
    default = fields.integer("original_max_position_embeddings", family.original_context or max_context)
    original = params.integer("original_max_position_embeddings", default)
    if params.has("original_max_position_embeddings"):
        _agree(fields, "original_max_position_embeddings", original)
    rotary_dim = _rotary_dim(fields, params, family, head_dim)
    made = make_rope(rope_type, params, RopeBase(theta, rotary_dim, max_context, original), family.interleaved)
    if unknown := params.unread(frozenset()):
        raise UnsupportedModel(f"config.json: rope type {rope_type!r} has unknown parameters {', '.join(unknown)}")
    return made


def _rotary_dim(fields: Fields, params: Fields, family: Family, head_dim: int) -> int:
    default = family.partial_rotary
    share = fields.number("partial_rotary_factor", default or 1.0, above=0)
    share = params.number("partial_rotary_factor", share, above=0)
    if params.has("partial_rotary_factor"):
        _agree(fields, "partial_rotary_factor", share)
    if default is None and share != 1.0:
        raise UnsupportedModel(f"config.json: partial_rotary_factor = {share:g}; this family rotates whole heads")
    rotary = int(head_dim * share)
    if share > 1 or rotary < 2 or rotary % 2:
        raise CorruptModel(
            f"config.json: head_dim {head_dim} with partial_rotary_factor {share:g} gives {rotary} rotated channels; "
            f"an even number from 2 to {head_dim} is needed"
        )
    return rotary


def _agree(fields: Fields, name: str, value: float) -> None:
    if fields.has(name) and fields.number(name) != value:
        raise CorruptModel(f"config.json: {name} is {fields.number(name):g} and, in the rope parameters, {value:g}")


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


def _by_type(fields: Fields, count: int, default: Callable[[int], bool], window: int | None) -> tuple[int | None, ...]:
    """Windows from ``layer_types``, or from ``default(index)`` (True: sliding)."""
    types = tuple(SLIDING if default(index) else FULL for index in range(count))
    if fields.has("layer_types"):
        types = fields.texts("layer_types", count)
    for unknown in sorted(set(types) - {FULL, SLIDING}):
        raise UnsupportedModel(f"config.json: layer type {unknown!r} is not supported, only {FULL} and {SLIDING}")
    if SLIDING in types and window is None:
        raise CorruptModel("config.json: layer_types has sliding_attention, but no sliding_window is in use")
    return tuple(window if kind == SLIDING else None for kind in types)


def _every_layer(default: int | None) -> Windows:
    """One window for all layers; an explicit null means none (Mistral, Phi-3)."""
    return lambda fields, count: (_window(fields, default),) * count


def _window(fields: Fields, default: int | None) -> int | None:
    if fields.has("sliding_window"):
        return fields.integer("sliding_window")
    return None if fields.given("sliding_window") else default


def _qwen_windows(fields: Fields, count: int) -> tuple[int | None, ...]:
    window = _window(fields, 4096)
    if not fields.boolean("use_sliding_window", False):
        window = None  # Qwen writes a number that it does not use
    first = fields.integer("max_window_layers", 28, minimum=0)
    return _by_type(fields, count, lambda index: window is not None and index >= first, window)


def _gemma_windows(default_pattern: int, pattern_field: bool) -> Windows:
    """Every ``pattern``-th layer sees everything, the others a window."""

    def windows(fields: Fields, count: int) -> tuple[int | None, ...]:
        pattern = default_pattern
        if pattern_field:
            internal = fields.integer("_sliding_window_pattern", default_pattern)
            pattern = fields.integer("sliding_window_pattern", internal)
        return _by_type(fields, count, lambda index: bool((index + 1) % pattern), _window(fields, 4096))

    return windows


def _smollm3_windows(fields: Fields, count: int) -> tuple[int | None, ...]:
    window = _window(fields, None)
    if not fields.boolean("use_sliding_window", False):
        window = None
    interval = fields.integer("no_rope_layer_interval", 4)
    bare = tuple((index + 1) % interval == 0 for index in range(count))
    if fields.has("no_rope_layers"):
        bare = tuple(not value for value in fields.integers("no_rope_layers", count))
    return _by_type(fields, count, lambda index: window is not None and bare[index], window)


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
    partial_rotary=0.5,
    interleaved=True,
    must_be={"mlp_bias": (False, "the family has no such bias")},
    tensors={"gate": "mlp.gate_up_proj", "up": "mlp.gate_up_proj"},
)
_QWEN2 = Family(
    biases=Biases(qkv=True),
    windows=_qwen_windows,
    max_context=32768,
    must_be={
        "attention_bias": (True, "the family always has biases on q, k and v"),
        "mlp_bias": (False, "the family has no such bias"),
        "use_mrope": (False, "positions are those of text"),
    },
)
_GEMMA2 = Family(
    biases=Biases(qkv=_ATTENTION_BIAS, o=_ATTENTION_BIAS),
    windows=_gemma_windows(2, pattern_field=False),
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
    "mistral": Family(windows=_every_layer(4096), kv_heads=8, max_context=131072, must_be=_NO_BIAS),
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
        windows=_every_layer(None),
        max_context=4096,
        original_context=4096,
        norm_eps=1e-5,
        partial_rotary=1.0,
        # names that earlier releases of the same checkpoints gave to longrope
        rope_aliases={"su": "longrope", "yarn": "longrope"},
        must_be=_NO_BIAS,
        tensors={
            **dict.fromkeys(("q", "k", "v"), "self_attn.qkv_proj"),
            **dict.fromkeys(("gate", "up"), "mlp.gate_up_proj"),
        },
    ),
    "gemma2": _GEMMA2,
    "gemma3_text": replace(
        _GEMMA2,
        windows=_gemma_windows(6, pattern_field=True),
        max_context=131072,
        theta=1_000_000.0,
        local_theta=10_000.0,
        qk_norm=True,
        softcaps=(None, None),
        # Transformers reads this field but does not apply it, so a value would have two meanings
        must_be={"attn_logit_softcapping": (None, "Gemma 3 caps no scores")},
    ),
    "granite": replace(_LLAMA, multipliers=True),
    "smollm3": replace(
        _LLAMA,
        windows=_smollm3_windows,
        kv_heads=4,
        max_context=32768,
        tied_head=True,
        theta=2_000_000.0,
        rope_layers=True,
        harmless=frozenset({"max_window_layers"}),
    ),
}
