"""Quantized matrices in the layout of our own CPU kernels (``kernels/``).

A value is ``d · code + m`` with 4 bits and ``d · (code − 128) + m`` with 8: one scale ``d`` and one constant ``m`` for
each row of a block of columns, so a fractional zero point (GGUF's Q4_1 and Q4_K) costs nothing. Both are float16,
rounded once: by up to 2**-11 of themselves, below 2**-14 by up to 2**-25. A matrix of 8 bits whose zero points are all
128 (GGUF's Q8_0) has no ``m``.

Sixteen rows make a panel, the last one filled up with zeros: a vector register then holds one value of each. A panel
is its blocks one after another, and a block is its codes, ``d`` of the sixteen rows and, if any, their ``m``. Codes lie
as the instructions take them that multiply four neighbouring bytes: 64 bytes are four columns of sixteen rows, row by
row. Codes of 8 bits are int8; with 4 bits a byte holds the code of a column in the block's first half (low) and of the
same column in its second half (high), so that unpacking is a mask and a shift.

A matrix of 16 bits is float16 itself: a panel is its columns one after another, and there are no constants.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporters.weights import QuantizedTensor

PANEL = 16
"""Rows."""
HALF_COLUMNS = 16
"""Of float16 a matrix has a multiple of them."""
_CONSTANT_BYTES = PANEL * 2
"""Of one block's ``d``, or ``m``."""
_CHUNK_VALUES = 1 << 22
"""Codes laid out at once: the temporaries stay near 16 MiB whatever the matrix's size."""


@dataclass(frozen=True)
class PackedMatrix:
    """``rows`` × ``columns``."""

    data: NDArray[np.uint8]
    """(bytes,)."""
    rows: int
    columns: int
    bits: int
    """4, 8 or 16."""
    block: int
    """16 or 32 columns; of 16 bits it means nothing."""
    offsets: bool
    """Whether there is an ``m``."""


def pack(tensor: QuantizedTensor) -> PackedMatrix:
    """Lay out ``tensor``; a group of several blocks repeats its constants in each.

    ValueError if the group is neither 16 columns nor a multiple of 32, or a constant is over float16's largest.
    """
    rows, columns = tensor.shape
    bits, block = tensor.bits, _block(tensor.group)
    panels, code_bytes = -(-rows // PANEL), PANEL * block * bits // 8
    offsets = bits == 4 or bool((tensor.zero != 128).any())
    data = np.empty((panels, columns // block, code_bytes + (2 if offsets else 1) * _CONSTANT_BYTES), np.uint8)
    step = max(_CHUNK_VALUES // (PANEL * columns), 1)
    for start in range(0, panels, step):
        part = tensor.take_rows(slice(start * PANEL, (start + step) * PANEL))
        codes, d, m = np.split(data[start : start + step], (code_bytes, code_bytes + _CONSTANT_BYTES), axis=-1)
        codes[...] = _codes(part, block)
        scale, offset = _scale_and_offset(part)
        d[...] = _constants("scale", scale, part.group // block)
        if offsets:
            m[...] = _constants("offset", offset, part.group // block)
    return PackedMatrix(data.reshape(-1), rows, columns, bits, block, offsets)


def pack_half(values: NDArray[np.float16]) -> PackedMatrix:
    """Lay out a matrix as it is. ValueError if its columns are no multiple of HALF_COLUMNS."""
    rows, columns = values.shape
    if columns % HALF_COLUMNS:
        raise ValueError(f"the CPU kernels take multiples of {HALF_COLUMNS} columns of float16, not {columns}")
    panels = _whole_panels(values).reshape(-1, PANEL, columns).transpose(0, 2, 1)
    data = np.ascontiguousarray(panels).view(np.uint8).reshape(-1)
    return PackedMatrix(data, rows, columns, 16, HALF_COLUMNS, False)


def _block(group: int) -> int:
    if group % 32 == 0:
        return 32
    if group == 16:
        return 16
    raise ValueError(f"the CPU kernels take groups of 16 columns or of a multiple of 32, not {group}")


def _codes(tensor: QuantizedTensor, block: int) -> NDArray[np.uint8]:
    """(panels, blocks, bytes of codes)."""
    if tensor.bits == 8:
        signed = _whole_panels(tensor.codes ^ np.uint8(128))  # code − 128 as int8
        split = signed.reshape(-1, PANEL, tensor.shape[1] // block, block // 4, 4)
    else:
        halves = _whole_panels(tensor.codes).reshape(-1, PANEL, tensor.shape[1] // block, 2, block // 8, 4)
        split = halves[:, :, :, 0] | (halves[:, :, :, 1] << np.uint8(4))
    ordered = split.transpose(0, 2, 3, 1, 4)
    return ordered.reshape(*ordered.shape[:2], -1)


def _scale_and_offset(tensor: QuantizedTensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """``d`` and ``m``, (rows, groups). In float64, so that float16 is the only rounding."""
    scale = tensor.scale.astype(np.float64)
    return scale, scale * ((128 if tensor.bits == 8 else 0) - tensor.zero.astype(np.float64))


def _constants(name: str, values: NDArray[np.float64], repeat: int) -> NDArray[np.uint8]:
    """(rows, groups) → (panels, blocks, 32) bytes of float16."""
    with np.errstate(over="ignore"):  # refused here
        half = values.astype(np.float16)
    if not np.isfinite(half).all():
        raise ValueError(f"its largest {name}, {np.abs(values).max():g}, is over float16's largest, 65504")
    panels = _whole_panels(half.repeat(repeat, axis=1))
    panels = panels.reshape(-1, PANEL, panels.shape[1]).transpose(0, 2, 1)
    return np.ascontiguousarray(panels).view(np.uint8)


def _whole_panels(rows: NDArray[Any]) -> NDArray[Any]:
    """``rows`` with zeros behind, up to a multiple of sixteen."""
    missing = -len(rows) % PANEL
    return np.pad(rows, ((0, missing), (0, 0))) if missing else rows
