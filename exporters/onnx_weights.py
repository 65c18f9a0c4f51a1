"""Quantized matrices in the layout of MatMulNBits and GatherBlockQuantized.

Both compute ``scale · (code − zero)`` with an integer zero point per block; a fractional one (GGUF's Q4_1 and Q4_K
are ``d·q + m``) would turn MatMulNBits' int8 path off. So the zero point is rounded, and what that leaves over, one
constant per row and block, is carried by extra columns: ``Σ_g offset[n, g] · Σ_{c in g} x[c]`` is one more product,
of the offsets with the block sums of the activation. One operator on ``(x, block sums of x)`` computes both.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from exporters.weights import QuantizedTensor


@dataclass(frozen=True)
class PackedMatrix:
    """``rows`` × ``columns + offset_columns``, block-wise quantized along the columns."""

    codes: NDArray[np.uint8]
    """(rows, blocks, group · bits / 8); of two 4-bit codes the first is in the low half."""
    scale: NDArray[np.float32]
    """(rows, blocks)."""
    zero: NDArray[np.uint8] | None
    """(rows, ⌈blocks · bits / 8⌉), packed as the codes. None: the middle code, 2**(bits − 1), everywhere."""
    bits: int
    group: int
    columns: int
    offset_columns: int
    """0, or one for each block of ``columns``."""


def pack(tensor: QuantizedTensor) -> PackedMatrix:
    """Lay out ``tensor``, offsets of its zero points included.

    The offsets are at most half a step of the matrix; at the matrix's own bit width they keep a fifteenth of that
    as error (4 bits). ValueError if the group is not a power of two from 16 to 256.
    """
    group, columns = tensor.group, tensor.shape[1]
    if group & (group - 1) or not 16 <= group <= 256:
        raise ValueError(f"ONNX Runtime's int8 product takes groups of 16, 32, 64, 128 or 256 columns, not {group}")
    zero, offset = tensor.split_zero()
    codes, scale = tensor.codes, tensor.scale
    offset_columns = offset.shape[1] if offset.any() else 0
    if offset_columns:
        extra = _quantize(offset, group, tensor.bits)
        codes = np.concatenate([codes, extra.codes], axis=1)
        scale = np.concatenate([scale, extra.scale], axis=1)
        zero = np.concatenate([zero, extra.zero.astype(np.uint8)], axis=1)
    rows = codes.shape[0]
    symmetric = bool((zero == 2 ** (tensor.bits - 1)).all())
    return PackedMatrix(
        codes=_pack_bits(codes, tensor.bits).reshape(rows, scale.shape[1], group * tensor.bits // 8),
        scale=np.ascontiguousarray(scale, np.float32),
        zero=None if symmetric else _pack_bits(zero, tensor.bits),
        bits=tensor.bits,
        group=group,
        columns=columns,
        offset_columns=offset_columns,
    )


def _quantize(values: NDArray[np.float32], group: int, bits: int) -> QuantizedTensor:
    """Round to the nearest of evenly spaced values per block; columns are padded with zeros to whole blocks."""
    rows, columns = values.shape
    blocks = np.pad(values, ((0, 0), (0, -columns % group))).reshape(rows, -1, group)
    top = 2**bits - 1
    low, high = np.minimum(blocks.min(-1), 0), np.maximum(blocks.max(-1), 0)
    scale = np.where(high > low, (high - low) / top, 1).astype(np.float32)
    zero = np.rint(-low / scale)
    codes = np.clip(np.rint(blocks / scale[..., None]) + zero[..., None], 0, top)
    return QuantizedTensor(codes.astype(np.uint8).reshape(rows, -1), scale, zero.astype(np.float32), bits)


def _pack_bits(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """(rows, n) codes → (rows, ⌈n · bits / 8⌉) bytes."""
    if bits == 8:
        return codes
    even = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2)))
    packed: NDArray[np.uint8] = even[:, ::2] | (even[:, 1::2] << np.uint8(4))
    return packed
