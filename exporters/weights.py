"""Weights on their way from a checkpoint to a graph: float arrays, or group-wise affine codes.

A matrix of float16 is one that a recipe keeps so among rounded ones (:mod:`exporters.compression`): the int8 and int4
formats leave it alone, and a builder stores it as it is.

A :class:`QuantizedTensor` is exact for every block format whose values are ``scale · (code − zero)``:
GGUF Q4_0, Q4_1, Q4_K, Q5_*, Q6_K and Q8_0 pass through without a second rounding. The zero point is a
float; an emitter whose engine wants integers takes :meth:`QuantizedTensor.split_zero` and carries the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class QuantizedTensor:
    """A matrix ``value[r, c] = scale[r, g] · (codes[r, c] − zero[r, g])`` with ``g = c // group``."""

    codes: NDArray[np.uint8]
    """(rows, cols), one code per byte, 0 .. 2**bits − 1."""
    scale: NDArray[np.float32]
    """(rows, cols / group)."""
    zero: NDArray[np.float32]
    """(rows, cols / group), in units of codes; may be fractional."""
    bits: int
    """4 or 8."""

    def __post_init__(self) -> None:
        rows, cols = self.codes.shape
        groups = self.scale.shape[1]
        if self.bits not in (4, 8):
            raise ValueError(f"bits must be 4 or 8, not {self.bits}")
        if self.scale.shape != (rows, groups) or self.zero.shape != (rows, groups) or cols % groups:
            raise ValueError(f"codes {self.codes.shape}, scale {self.scale.shape} and zero {self.zero.shape} disagree")

    @property
    def shape(self) -> tuple[int, int]:
        rows, cols = self.codes.shape
        return rows, cols

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return int(self.codes.shape[1] // self.scale.shape[1])

    def dequantize(self) -> NDArray[np.float32]:
        """(rows, cols) float32."""
        rows, cols = self.codes.shape
        codes = self.codes.reshape(rows, -1, self.group).astype(np.float32)
        return ((codes - self.zero[:, :, None]) * self.scale[:, :, None]).reshape(rows, cols)

    def take_rows(self, index: NDArray[np.intp] | slice) -> QuantizedTensor:
        return QuantizedTensor(self.codes[index], self.scale[index], self.zero[index], self.bits)

    def split_zero(self) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """Integer zero points and what they leave over.

        Returns ``(zero, offset)``, both (rows, groups), with
        ``value = scale · (codes − zero) + offset``; ``offset`` is 0 where the zero point is a code already.
        """
        nearest = np.clip(np.rint(self.zero), 0, 2**self.bits - 1)
        offset = self.scale * (nearest - self.zero)
        return nearest.astype(np.uint8), offset.astype(np.float32)


Tensor = NDArray[np.float32] | NDArray[np.float16] | QuantizedTensor
"""A weight: 1-D (norms, biases) and unquantized matrices are float32 arrays, matrices that are kept so float16."""


def is_half(tensor: Tensor) -> TypeGuard[NDArray[np.float16]]:
    """Whether it is a matrix that is kept in float16."""
    return not isinstance(tensor, QuantizedTensor) and tensor.dtype == np.float16


def dequantize(tensor: Tensor) -> NDArray[np.float32]:
    return tensor.dequantize() if isinstance(tensor, QuantizedTensor) else np.asarray(tensor, np.float32)


def concat_rows(parts: Sequence[Tensor]) -> list[Tensor]:
    """Join neighbouring matrices over one input that have the same format, so that one product serves them.

    Returns one matrix if all can be joined, else the fewest runs, in order.
    """
    runs: list[list[Tensor]] = []
    for part in parts:
        if runs and _format(runs[-1][0]) == _format(part):
            runs[-1].append(part)
        else:
            runs.append([part])
    return [run[0] if len(run) == 1 else _stack(run) for run in runs]


def _format(tensor: Tensor) -> tuple[int, int]:
    if isinstance(tensor, QuantizedTensor):
        return tensor.bits, tensor.group
    return (16, 0) if is_half(tensor) else (32, 0)


def _stack(run: Sequence[Tensor]) -> Tensor:
    quantized = [part for part in run if isinstance(part, QuantizedTensor)]
    if not quantized:
        joined = np.concatenate([dequantize(part) for part in run])
        return joined.astype(np.float16) if is_half(run[0]) else joined
    return QuantizedTensor(
        np.concatenate([part.codes for part in quantized]),
        np.concatenate([part.scale for part in quantized]),
        np.concatenate([part.zero for part in quantized]),
        quantized[0].bits,
    )
