"""Rotary frequencies and their scalings, from a ``rope_parameters`` (or ``rope_scaling``) object.

Every function follows Transformers' ``modeling_rope_utils.py`` (5.x), which is what checkpoints are released
against; the papers: RoPE arXiv 2104.09864, linear scaling arXiv 2306.15595, YaRN arXiv 2309.00071, LongRoPE
arXiv 2402.13753, Llama 3 scaling from ``llama-models`` (``apply_scaling``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import CorruptModel, UnsupportedModel
from exporters.architecture import Rope
from exporters.fields import Fields
from exporters.layer_windows import FULL, SLIDING

Float = NDArray[np.float64]


@dataclass(frozen=True)
class RopeRow:
    """What a family does differently."""

    theta: float = 10_000.0
    """Default base."""
    local_theta: float | None = None
    """Default base of sliding layers when they have their own (Gemma 3)."""
    partial: float | None = None
    """Default share of a head that is rotated; None: always all of it."""
    original_context: int | None = None
    """Default of ``original_max_position_embeddings``; None: the maximum context."""
    interleaved: bool = False
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other names of rope types."""


def read_ropes(fields: Fields, row: RopeRow, head_dim: int, max_context: int) -> tuple[dict[str, Rope], int | None]:
    """The rotary embedding of each layer type (full_attention, sliding_attention), and the longrope switch.

    Raises UnsupportedModel for an unknown type or parameter, CorruptModel for a missing or contradictory number.
    """
    if fields.has("rope_parameters") and fields.has("rope_scaling"):
        raise CorruptModel("config.json: both rope_parameters and rope_scaling are given; keep one")
    scaled = fields.mapping("rope_scaling")
    params = fields.mapping("rope_parameters") or scaled
    nested = {key: params[key] for key in (FULL, SLIDING) if isinstance(params.get(key), Mapping)}
    if unknown := sorted(set(params) - set(nested)) if nested else []:
        raise UnsupportedModel(f"config.json: rope_parameters has {', '.join(unknown)} beside its layer types")
    per_type: Mapping[str, Mapping[str, Any]] = nested or {FULL: params, SLIDING: params}
    if row.local_theta is not None:
        if params and not nested and not scaled:
            raise UnsupportedModel("config.json: rope_parameters must name its layer types in this family")
        # Gemma 3: a scaling is for the global layers, local ones have a plain base of their own
        local = fields.number("rope_local_base_freq", row.local_theta, above=0)
        per_type = {SLIDING: {"rope_theta": local}, FULL: params} if not nested else {SLIDING: {}, **nested}
    ropes: dict[str, Rope] = {}
    switches: set[int] = set()
    for layer_type, values in per_type.items():
        theta = row.local_theta if layer_type == SLIDING and row.local_theta else None
        ropes[layer_type], switch = _rope(fields, row, values, theta, head_dim, max_context)
        switches |= {switch} if switch else set()
    if len(switches) > 1:
        raise UnsupportedModel(f"config.json: layer types switch to long factors at different lengths {switches}")
    return ropes, switches.pop() if switches else None


def _rope(
    fields: Fields, row: RopeRow, values: Mapping[str, Any], local: float | None, head_dim: int, max_context: int
) -> tuple[Rope, int | None]:
    params = Fields(values, "config.json, rope parameters")
    rope_type = params.text("type", "default") if not params.has("rope_type") else params.text("rope_type")
    if params.has("type") and params.text("type") != rope_type:
        raise CorruptModel(f"config.json: rope type {rope_type!r} contradicts {params.text('type')!r}")
    rope_type = row.aliases.get(rope_type, rope_type)
    theta = params.number("rope_theta", local or fields.number("rope_theta", row.theta))
    if theta <= 1:
        raise fields.wrong("rope_theta", theta, "a number above 1")
    if local is None and params.has("rope_theta"):
        fields.agree("rope_theta", theta)
    default = fields.integer("original_max_position_embeddings", row.original_context or max_context)
    original = params.integer("original_max_position_embeddings", default)
    if params.has("original_max_position_embeddings"):
        fields.agree("original_max_position_embeddings", original)
    rotary_dim = _rotary_dim(fields, params, row, head_dim)
    made = make_rope(rope_type, params, RopeBase(theta, rotary_dim, max_context, original), row.interleaved)
    if unknown := params.unread(frozenset()):
        raise UnsupportedModel(f"config.json: rope type {rope_type!r} has unknown parameters {', '.join(unknown)}")
    return made


def _rotary_dim(fields: Fields, params: Fields, row: RopeRow, head_dim: int) -> int:
    default = row.partial
    share = fields.number("partial_rotary_factor", default or 1.0, above=0)
    share = params.number("partial_rotary_factor", share, above=0)
    if params.has("partial_rotary_factor"):
        fields.agree("partial_rotary_factor", share)
    if default is None and share != 1.0:
        raise UnsupportedModel(f"config.json: partial_rotary_factor = {share:g}; this family rotates whole heads")
    rotary = int(head_dim * share) if share <= 1 else 0
    if rotary < 2 or rotary % 2:
        raise CorruptModel(
            f"config.json: head_dim {head_dim} with partial_rotary_factor {share:g} gives {rotary} rotated channels; "
            f"an even number from 2 to {head_dim} is needed"
        )
    return rotary


@dataclass(frozen=True)
class RopeBase:
    """What the scalings start from."""

    theta: float
    rotary_dim: int
    max_context: int
    original_context: int
    """Length the model was trained at; the scalings stretch from it."""

    def inv_freq(self) -> Float:
        """(rotary_dim / 2,): ``theta ** (-2i / rotary_dim)``."""
        return self.theta ** -(np.arange(0, self.rotary_dim, 2) / self.rotary_dim)


@dataclass(frozen=True)
class Frequencies:
    """Result of a scaling. ``long`` serves sequences past ``RopeBase.original_context``."""

    inv_freq: Float
    scale: float = 1.0
    long: Float | None = None


def make_rope(rope_type: str, params: Fields, base: RopeBase, interleaved: bool) -> tuple[Rope, int | None]:
    """The rotary embedding and, for longrope, the length past which its long factors hold.

    Raises UnsupportedModel for a type not in :data:`SCALINGS`, CorruptModel for missing or mistyped parameters.
    """
    scaling = SCALINGS.get(rope_type)
    if scaling is None:
        raise UnsupportedModel(f"rope type {rope_type!r} is not supported; supported: {', '.join(sorted(SCALINGS))}")
    made = scaling(params, base)
    long = None if made.long is None else tuple(made.long.tolist())
    rope = Rope(
        inv_freq=tuple(made.inv_freq.tolist()),
        scale=made.scale,
        interleaved=interleaved,
        long_inv_freq=long,
        long_scale=made.scale if long else 1.0,
    )
    return rope, base.original_context if long else None


def _default(params: Fields, base: RopeBase) -> Frequencies:
    return Frequencies(base.inv_freq())


def _linear(params: Fields, base: RopeBase) -> Frequencies:
    return Frequencies(base.inv_freq() / params.number("factor", above=0))


def _llama3(params: Fields, base: RopeBase) -> Frequencies:
    """Long waves are slowed by ``factor``, short ones kept, those between blended."""
    factor = params.number("factor", above=0)
    low, high = params.number("low_freq_factor", above=0), params.number("high_freq_factor", above=0)
    if high <= low:
        raise params.wrong("high_freq_factor", high, f"above low_freq_factor ({low:g})")
    inv_freq = base.inv_freq()
    turns = base.original_context * inv_freq / (2 * math.pi)  # full rotations over the trained context
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return Frequencies(keep * inv_freq + (1 - keep) * inv_freq / factor)


def _yarn(params: Fields, base: RopeBase) -> Frequencies:
    """NTK-by-parts: a ramp over channels between plain and interpolated frequencies, and a temperature."""
    factor = params.number("factor", base.max_context / base.original_context, above=0)
    fast, slow = params.number("beta_fast", 32.0, above=0), params.number("beta_slow", 1.0, above=0)
    dim = base.rotary_dim

    def channel(rotations: float) -> float:
        return dim * math.log(base.original_context / (rotations * 2 * math.pi)) / (2 * math.log(base.theta))

    low, high = channel(fast), channel(slow)
    if params.boolean("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low or 0.001  # Transformers' guard against a step of no width
    ramp = np.clip((np.arange(dim // 2) - low) / width, 0.0, 1.0)
    inv_freq = base.inv_freq()
    return Frequencies(inv_freq / factor * ramp + inv_freq * (1 - ramp), _yarn_scale(params, factor))


def _yarn_scale(params: Fields, factor: float) -> float:
    def temperature(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    mscale = params.number("mscale", 0.0)
    mscale_all = params.number("mscale_all_dim", 0.0)
    natural = temperature(mscale) / temperature(mscale_all) if mscale and mscale_all else temperature(1.0)
    return params.number("attention_factor", natural, above=0)


def _longrope(params: Fields, base: RopeBase) -> Frequencies:
    """One divisor per frequency, from one of two lists by the sequence's length."""
    pairs = base.rotary_dim // 2
    short = np.asarray(params.numbers("short_factor", pairs))
    long = np.asarray(params.numbers("long_factor", pairs))
    factor = params.number("factor", base.max_context / base.original_context, above=0)
    if base.original_context < 2:
        raise params.wrong("original_max_position_embeddings", base.original_context, "at least 2")
    natural = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(base.original_context))
    scale = params.number("attention_factor", natural, above=0)
    return Frequencies(base.inv_freq() / short, scale, base.inv_freq() / long)


SCALINGS: Mapping[str, Callable[[Fields, RopeBase], Frequencies]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
