"""Quantized matrices in the layout of MatMulNBits and GatherBlockQuantized.

Both compute ``scale · (code − zero)`` with an integer zero point per block; a fractional one (GGUF's Q4_1 and Q4_K
are ``d·q + m``) would turn MatMulNBits' fast paths off. So the zero point is rounded, and what that leaves over, one
constant per row and block, is carried by extra columns: ``Σ_g offset[n, g] · Σ_{c in g} x[c]`` is one more product,
of the offsets with the block sums of the activation. One operator on ``(x, block sums of x)`` computes both.

One 4-bit digit for an offset adds half as much error again as the int8 activations make; two digits add none that
can be measured: the columns of the first are fed with the sums, those of the second with the sums / 15.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from exporters.weights import QuantizedTensor


@dataclass(frozen=True)
class PackedMatrix:
    """``rows`` × ``columns + offset_columns``, block-wise quantized along the columns.

    The offset columns are, for each digit, one for each block of ``columns``.
    """

    codes: NDArray[np.uint8]
    """(rows, blocks, group · bits / 8); of two 4-bit codes the first is in the low half."""
    scale: NDArray[np.float32]
    """(rows, blocks)."""
    zero: NDArray[np.uint8] | None
    """(rows, ⌈blocks · bits / 8⌉), packed as the codes. None: the middle code, 2**(bits − 1), everywhere."""
    bits: int
    group: int
    columns: int
    digits: int
    """How many the offsets have; 0: all offsets are 0."""

    @property
    def offset_columns(self) -> int:
        return self.digits * (self.columns // self.group)

    @property
    def digit_base(self) -> float:
        """A unit of one digit is this many of the next."""
        return 2.0**self.bits - 1


def pack(tensor: QuantizedTensor, digits_together: bool = False) -> PackedMatrix:
    """Lay out ``tensor`` with the offsets of its zero points.

    Offset columns come digit by digit, with ``digits_together`` block by block. ValueError if the group is not a power
    of two from 16 to 256.
    """
    group, columns = tensor.group, tensor.shape[1]
    if group & (group - 1) or not 16 <= group <= 256:
        raise ValueError(f"ONNX Runtime's int8 product takes groups of 16, 32, 64, 128 or 256 columns, not {group}")
    zero, offset = tensor.split_zero()
    codes, scale, digits = tensor.codes, tensor.scale, 0
    if offset.any():
        digits = 2 if tensor.bits == 4 else 1
        extra = _digits(offset, digits, group, tensor.bits, digits_together)
        codes = np.concatenate([codes, extra.codes], axis=1)
        scale = np.concatenate([scale, extra.scale], axis=1)
        zero = np.concatenate([zero, extra.zero.astype(np.uint8)], axis=1)
    symmetric = bool((zero == 2 ** (tensor.bits - 1)).all())
    return PackedMatrix(
        codes=pack_bits(codes, tensor.bits).reshape(*scale.shape, group * tensor.bits // 8),
        scale=np.ascontiguousarray(scale, np.float32),
        zero=None if symmetric else pack_bits(zero, tensor.bits),
        bits=tensor.bits,
        group=group,
        columns=columns,
        digits=digits,
    )


def _digits(offset: NDArray[np.float32], digits: int, group: int, bits: int, together: bool) -> QuantizedTensor:
    """Write ``offset`` (rows, n) as (rows, digits · n) codes, padded with zeros to whole blocks of ``group``.

    ``offset = Σ_i digit[i] / base**i`` with the remainder of one digit as the next.
    """
    rows, n = offset.shape
    middle, base = 2 ** (bits - 1), np.float32(2**bits - 1)
    blocks = -(-digits * n // group)
    top = np.abs(offset).max(axis=1, keepdims=True)
    # a remainder is at most half a step, which the base turns into the whole range again: one step serves all digits
    step = np.where(top > 0, top / (middle - 0.5), 1).astype(np.float32)
    codes = np.full((rows, blocks * group), middle, np.uint8)
    rest = offset
    for digit in range(digits):
        place = slice(digit, digits * n, digits) if together else slice(digit * n, (digit + 1) * n)
        whole = np.clip(np.rint(rest / step), -middle, middle - 1)
        codes[:, place] = whole + middle
        rest = (rest - whole * step) * base
    scale = step.repeat(blocks, axis=1)
    return QuantizedTensor(codes, scale, np.full_like(scale, middle), bits)


def pack_bits(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """(rows, n) codes → (rows, ⌈n · bits / 8⌉) bytes."""
    if bits == 8:
        return codes
    even = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2)))
    packed: NDArray[np.uint8] = even[:, ::2] | (even[:, 1::2] << np.uint8(4))
    return packed
