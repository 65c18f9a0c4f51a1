"""Weight formats as ``Checkpoint → Checkpoint``: fp32, fp16, int8 and int4.

What each does with a matrix (norms and biases stay float32 in all of them):

========  ============================  ==========================================  ==========================
weights   float source                  4-bit source                                8-bit source
========  ============================  ==========================================  ==========================
fp32      as it is                      dequantized                                 dequantized
fp16      rounded to float16            dequantized, rounded                        dequantized, rounded
int8      8 bit                         same values, 8-bit codes (see ``widen``)    as it is
int4      4 bit; embedding, head 8 bit  as it is                                    as it is
========  ============================  ==========================================  ==========================

A source that is quantized already is never rounded a second time by int8 and int4, nor is a matrix that a recipe keeps
in float16. 8 bit is symmetric around the
code 128; 4 bit is asymmetric with an integer zero point. Both round to nearest between the extremes of a group,
and 0 is always a value exactly.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import ConfigError, UnsupportedModel
from exporters.checkpoint import Checkpoint, CheckpointView
from exporters.weights import QuantizedTensor, Tensor, dequantize, is_half

WeightFormat = Literal["fp32", "fp16", "int8", "int4"]

MIN_GROUP = 16
"""MatMulNBits takes no smaller block."""
_CHUNK_VALUES = 1 << 22
"""Values worked on at once: the temporaries stay near 64 MiB whatever the tensor's size."""


class QuantizedCheckpoint(CheckpointView):
    """``base`` with its matrices in the format ``weights``.

    ``group`` columns share a scale: a power of two ≥ 16. Where it does not divide a matrix's columns, the largest
    smaller power of two ≥ 16 that does is taken; a matrix that none divides stays float32.
    With fp16 the arrays returned are float32 holding values float16 can hold: how they are stored is the builder's
    business. UnsupportedModel if a value is over float16's largest.
    """

    def __init__(self, base: Checkpoint, weights: str, group: int = 32) -> None:
        if weights not in get_args(WeightFormat):
            raise ConfigError(f"unknown weight format {weights!r}; known: {', '.join(get_args(WeightFormat))}")
        if group < MIN_GROUP or group & (group - 1):
            raise ConfigError(f"quantization group must be a power of two of at least {MIN_GROUP}, not {group}")
        super().__init__(base)
        self._weights = weights
        self._group = group

    def tensor(self, name: str) -> Tensor:
        value = self._base.tensor(name)
        if not isinstance(value, QuantizedTensor) and value.ndim == 1:
            return value
        if self._weights == "fp32":
            return dequantize(value)
        if self._weights == "fp16":
            return _to_fp16(name, dequantize(value))
        if isinstance(value, QuantizedTensor):
            return widen(value) if self._weights == "int8" else value
        if is_half(value):
            return value
        bits = 8 if self._weights == "int8" or name in ("embed", "head") else 4
        return quantize(dequantize(value), bits, self._group)


def quantize(values: NDArray[np.float32], bits: int, group: int) -> Tensor:
    """Round a (rows, cols) matrix to ``bits`` (8: symmetric, 4: asymmetric); float32 if no group fits its columns."""
    rows, cols = values.shape
    fitting = fitting_group(cols, group)
    if fitting is None:
        return values
    codes = np.empty((rows, cols), np.uint8)
    scale = np.empty((rows, cols // fitting), np.float32)
    zero = np.empty_like(scale)
    step = max(_CHUNK_VALUES // cols, 1)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        grouped = values[part].reshape(-1, cols // fitting, fitting)
        rounded, scale[part], zero[part] = _symmetric(grouped, bits) if bits == 8 else _asymmetric(grouped, bits)
        codes[part] = rounded.reshape(-1, cols)
    return QuantizedTensor(codes, scale, zero, bits)


def fitting_group(cols: int, group: int) -> int | None:
    """The largest power of two from ``group`` down to 16 that divides ``cols``; None if none does."""
    while group >= MIN_GROUP:
        if cols % group == 0:
            return group
        group //= 2
    return None


def widen(tensor: QuantizedTensor) -> QuantizedTensor:
    """The same values as 8-bit codes.

    4-bit codes times 16 with the scale over 16: nothing is rounded, and an engine that rounds a fractional zero
    point to an integer then loses a sixteenth of what it loses at 4 bits.
    """
    if tensor.bits == 8:
        return tensor
    return QuantizedTensor(tensor.codes * np.uint8(16), tensor.scale / np.float32(16), tensor.zero * np.float32(16), 8)


def _symmetric(grouped: NDArray[np.float32], bits: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    middle = np.float32(2 ** (bits - 1))
    scale = _nonzero(np.abs(grouped).max(-1) / (middle - 1))
    codes = np.rint(grouped / scale[..., None]) + middle
    return codes.astype(np.uint8), scale, np.full_like(scale, middle)


def _asymmetric(grouped: NDArray[np.float32], bits: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    top = np.float32(2**bits - 1)
    low = np.minimum(grouped.min(-1), 0)  # 0 inside the range: it is then a code exactly
    scale = _nonzero((np.maximum(grouped.max(-1), 0) - low) / top)
    zero = np.clip(np.rint(-low / scale), 0, top)
    codes = np.clip(np.rint(grouped / scale[..., None]) + zero[..., None], 0, top)
    return codes.astype(np.uint8), scale, zero


def _nonzero(scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """A group of zeros (or of values too small to divide by) gets the scale 1 and so the value 0."""
    return np.where(scale < np.finfo(np.float32).tiny, np.float32(1), scale).astype(np.float32)


def _to_fp16(name: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
    largest = float(np.abs(values).max(initial=0.0))
    if largest > float(np.finfo(np.float16).max):
        raise UnsupportedModel(f"{name} holds {largest:g}, over float16's largest 65504; export with fp32 or int8")
    return values.astype(np.float16).astype(np.float32)
