"""GGUF block formats decoded into :data:`exporters.weights.Tensor` without a second rounding.

The layouts are those of ggml (``ggml-common.h``, ``block_q4_0`` and so on); the ``gguf`` package's ``quants``
module is the executable reference the tests compare with. Every quantized format here is affine per group, so it
becomes a :class:`~exporters.weights.QuantizedTensor` with the file's own codes and scales.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from edge_runtime.errors import CorruptModel, UnsupportedModel
from exporters.weights import QuantizedTensor, Tensor

Bytes = NDArray[np.uint8]
Float = NDArray[np.float32]


@dataclass(frozen=True)
class Affine:
    """Blocks as codes (…, groups, group), with ``value = scale · code + offset`` or ``scale · (code − zero)``."""

    codes: Bytes
    scale: Float
    """(…, groups)."""
    zero: Float | float
    """(…, groups), or one number for all."""
    bits: int


Decoder = Callable[[Bytes], Affine]
"""(blocks, bytes of a block) → its groups."""


def decode(raw: Bytes, kind: GGMLQuantizationType, name: str) -> Tensor:
    """Decode whole rows.

    ``raw`` is (rows, bytes of a row), any run of rows of the tensor. Returns (rows, columns): float32 for F32, F16
    and BF16, else an exact :class:`QuantizedTensor`. ``name`` is the tensor's, for messages. Raises
    UnsupportedModel for a format not in :func:`supported`, CorruptModel if a value or scale is not finite.
    """
    if kind in _FLOATS:
        values = _FLOATS[kind](np.ascontiguousarray(raw))
        _require_finite(values, kind, name)
        return values
    if kind not in _BLOCKS:
        raise UnsupportedModel(
            f"tensor {name!r} is stored as {kind.name}, which is not read; read are {', '.join(supported())}. "
            "Take or make another quantization of the model"
        )
    rows = len(raw)
    made = _BLOCKS[kind](np.ascontiguousarray(raw).reshape(-1, _sizes(kind)[1]))
    scale = made.scale.reshape(rows, -1)
    zero = np.broadcast_to(np.asarray(made.zero, np.float32), made.scale.shape).reshape(rows, -1)
    _require_finite(scale, kind, name)
    _require_finite(zero, kind, name)
    return QuantizedTensor(made.codes.reshape(rows, -1), scale, np.ascontiguousarray(zero), made.bits)


def supported() -> list[str]:
    """Names of the formats :func:`decode` reads."""
    return [kind.name for kind in (*_FLOATS, *_BLOCKS)]


def row_bytes(columns: int, kind: GGMLQuantizationType, name: str) -> int:
    """Bytes of one row. CorruptModel if a row is not a whole number of blocks."""
    values, size = _sizes(kind)
    if columns % values:
        raise CorruptModel(f"tensor {name!r}: rows of {columns} values are not whole {kind.name} blocks of {values}")
    return columns // values * size


def _sizes(kind: GGMLQuantizationType) -> tuple[int, int]:
    """Values and bytes of a block."""
    values, size = GGML_QUANT_SIZES[kind]
    return int(values), int(size)


def _require_finite(values: Float, kind: GGMLQuantizationType, name: str) -> None:
    if not np.isfinite(values).all():
        raise CorruptModel(f"tensor {name!r} ({kind.name}) holds values or scales that are not finite numbers")


# ---- pieces


def _half(raw: Bytes) -> Float:
    """(blocks, 2·n) bytes → (blocks, n) numbers stored as f16."""
    return np.ascontiguousarray(raw).view("<f2").astype(np.float32)


def _nibbles(packed: Bytes) -> Bytes:
    """(…, n) bytes → (…, 2, n): all low halves, then all high halves."""
    out = np.empty((*packed.shape[:-1], 2, packed.shape[-1]), np.uint8)
    np.bitwise_and(packed, 0x0F, out=out[..., 0, :])
    np.right_shift(packed, 4, out=out[..., 1, :])
    return out


def _fifth_bits(raw: Bytes) -> Bytes:
    """(blocks, 4) bytes, one bit per weight, → (blocks, 1, 32) with 16 where the bit is set."""
    return np.unpackbits(raw, axis=-1, bitorder="little")[:, None, :] << np.uint8(4)


def _affine(codes: Bytes, scale: Float, offset: Float, bits: int) -> Affine:
    """``scale · code + offset`` in terms of a zero point, which is fractional in general.

    A zero scale makes a constant block, which no zero point can express: it becomes ``offset · (1 − 0)``.
    """
    constant = scale == 0
    zero = np.divide(-offset, scale, out=np.zeros_like(scale), where=~constant)
    if constant.any():
        codes = np.where(constant[..., None], np.uint8(1), codes)
        scale = np.where(constant, offset, scale)
    return Affine(codes, scale, zero, bits)


# ---- formats of 32 weights with one scale


def _q4_0(blocks: Bytes) -> Affine:
    return Affine(_nibbles(blocks[:, 2:]).reshape(-1, 1, 32), _half(blocks[:, :2]), 8.0, 4)


def _q4_1(blocks: Bytes) -> Affine:
    codes = _nibbles(blocks[:, 4:]).reshape(-1, 1, 32)
    return _affine(codes, _half(blocks[:, :2]), _half(blocks[:, 2:4]), 4)


def _q5_0(blocks: Bytes) -> Affine:
    codes = _nibbles(blocks[:, 6:]).reshape(-1, 1, 32) | _fifth_bits(blocks[:, 2:6])
    return Affine(codes, _half(blocks[:, :2]), 16.0, 8)


def _q5_1(blocks: Bytes) -> Affine:
    codes = _nibbles(blocks[:, 8:]).reshape(-1, 1, 32) | _fifth_bits(blocks[:, 4:8])
    return _affine(codes, _half(blocks[:, :2]), _half(blocks[:, 2:4]), 8)


def _q8_0(blocks: Bytes) -> Affine:
    codes = blocks[:, 2:] ^ np.uint8(0x80)  # two's complement plus 128
    return Affine(codes.reshape(-1, 1, 32), _half(blocks[:, :2]), 128.0, 8)


# ---- formats of 256 weights with quantized scales


def _k_scales(packed: Bytes) -> tuple[Float, Float]:
    """(blocks, 12) bytes → eight 6-bit scales and eight 6-bit minima, each (blocks, 8)."""
    low, middle, high = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([low & 0x3F, (high & 0x0F) | ((low >> 2) & 0x30)], axis=1)
    minima = np.concatenate([middle & 0x3F, (high >> 4) | ((middle >> 2) & 0x30)], axis=1)
    return scales.astype(np.float32), minima.astype(np.float32)


def _k_affine(codes: Bytes, blocks: Bytes, bits: int) -> Affine:
    scales, minima = _k_scales(blocks[:, 4:16])
    return _affine(codes, _half(blocks[:, :2]) * scales, -(_half(blocks[:, 2:4]) * minima), bits)


def _q4_k(blocks: Bytes) -> Affine:
    return _k_affine(_nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32), blocks, 4)


def _q5_k(blocks: Bytes) -> Affine:
    low = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    shifts = np.arange(8, dtype=np.uint8)[:, None]
    high = (blocks[:, None, 16:48] >> shifts) & np.uint8(1)  # bit g of byte i belongs to weight i of group g
    return _k_affine(low | (high << np.uint8(4)), blocks, 8)


def _q6_k(blocks: Bytes) -> Affine:
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    high = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & np.uint8(3)
    codes = (low | (high << np.uint8(4))).reshape(-1, 16, 16)
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    return Affine(codes, _half(blocks[:, 208:]) * scales, 32.0, 8)


# ---- plain numbers


def _f32(raw: Bytes) -> Float:
    return raw.view("<f4").astype(np.float32)


def _bf16(raw: Bytes) -> Float:
    return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)


_FLOATS: Mapping[GGMLQuantizationType, Callable[[Bytes], Float]] = {
    GGMLQuantizationType.F32: _f32,
    GGMLQuantizationType.F16: _half,
    GGMLQuantizationType.BF16: _bf16,
}
_BLOCKS: Mapping[GGMLQuantizationType, Decoder] = {
    GGMLQuantizationType.Q4_0: _q4_0,
    GGMLQuantizationType.Q4_1: _q4_1,
    GGMLQuantizationType.Q5_0: _q5_0,
    GGMLQuantizationType.Q5_1: _q5_1,
    GGMLQuantizationType.Q8_0: _q8_0,
    GGMLQuantizationType.Q4_K: _q4_k,
    GGMLQuantizationType.Q5_K: _q5_k,
    GGMLQuantizationType.Q6_K: _q6_k,
}
