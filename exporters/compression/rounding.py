"""Rounding of matrices by what is multiplied with them.

Of a product ``y = W x`` the error of rounding is ``Δ G Δᵀ`` for each row Δ of ``Ŵ − W``, where ``G`` is the mean of
``x xᵀ`` over a text: what one weight's rounding does wrong, others can make good that have not been rounded yet.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from exporters.compression.grids import fit
from exporters.weights import QuantizedTensor

Array = NDArray[np.float32]
_BLOCK = 128
"""Columns after which their errors go to all later ones, in one product."""
DAMPING = 0.01
"""Of the mean of G's diagonal, added to it: directions in which the text says nothing."""


def nearest(weight: Array, bits: int, group: int, symmetric: bool = False) -> QuantizedTensor:
    """Each weight by itself. ``group`` columns share a scale and divide the matrix's."""
    rows, columns = weight.shape
    grid = fit(weight.reshape(-1, group), bits, symmetric)
    codes = grid.codes(weight.reshape(-1, group)).reshape(rows, columns).astype(np.uint8)
    return QuantizedTensor(codes, grid.scale.reshape(rows, -1), grid.zero.reshape(rows, -1), bits)


class Inputs:
    """What is multiplied with a matrix, on a text."""

    def __init__(self, x: Array) -> None:
        """``x`` (n, columns)."""
        self.gram: Array = x.T @ x / np.float32(len(x))
        """(columns, columns), the mean of ``x xᵀ``."""

    @cached_property
    def upper(self) -> Array:
        """The factor U of G⁻¹ = Uᵀ U, in float64 on the way."""
        damped = self.gram.astype(np.float64)
        mean = float(np.diag(damped).mean())
        damped[np.diag_indices(len(damped))] += DAMPING * mean if mean > 0 else 1.0
        return np.linalg.cholesky(np.linalg.inv(damped)).T.astype(np.float32)


def compensated(weight: Array, inputs: Inputs, bits: int, group: int, symmetric: bool = False) -> QuantizedTensor:
    """GPTQ (Frantar et al. 2022, arXiv 2210.17323): columns are rounded one after another, and each error is made good
    by those that follow, as far as the inputs go together.

    The grid of a group is fitted when its turn comes, to the weights as they are by then, by what errors in its columns
    cost.
    """
    rows, columns = weight.shape
    left = np.array(weight.T, np.float32, order="C")  # a row for each column, which is what is worked on
    upper = inputs.upper
    diagonal = np.diag(upper)
    importance = np.asarray(1 / diagonal**2, np.float32)  # what an error that nothing makes good any more costs
    codes = np.empty((columns, rows), np.uint8)
    scale, zero = (np.empty((rows, columns // group), np.float32) for _ in range(2))
    block = max(_BLOCK, group)  # both are powers of two
    for start in range(0, columns, block):
        end = min(start + block, columns)
        errors = np.empty((end - start, rows), np.float32)
        for column in range(start, end):
            if column % group == 0:
                part = slice(column, column + group)
                grid = fit(left[part].T, bits, symmetric, importance[part])
                scale[:, column // group], zero[:, column // group] = grid.scale[:, 0], grid.zero[:, 0]
                grid = grid.of_rows()
            code = grid.codes(left[column])
            codes[column] = code
            error = (left[column] - grid.scale * (code - grid.zero)) / diagonal[column]
            errors[column - start] = error
            left[column + 1 : end] -= upper[column, column + 1 : end, None] * error
        left[end:] -= upper[start:end, end:].T @ errors
    return QuantizedTensor(np.ascontiguousarray(codes.T), scale, zero, bits)


def error_of(rounded: Array, weight: Array, gram: Array) -> float:
    """The mean square error of the product, summed over its outputs."""
    difference = (rounded - weight).astype(np.float64)
    return float(np.einsum("ij,jk,ik->", difference, gram.astype(np.float64), difference, optimize=True))
