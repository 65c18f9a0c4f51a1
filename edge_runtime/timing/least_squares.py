"""Least squares whose solution has no negative number, robust against single values that are far off."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
_HUBER = 1.345
"""Standard deviations from which an error counts less: 95 % of the efficiency of plain least squares on normal errors
(Huber, Robust Statistics, 1981)."""
_ROUNDS = 12
_TINY = 1e-12


def nonnegative(matrix: Vector, values: Vector) -> Vector:
    """x ≥ 0 for which ``matrix @ x`` is nearest to ``values``: (n, k) and (n,) to (k,).

    The active-set method of Lawson and Hanson, Solving Least Squares Problems, 1974, algorithm NNLS. Columns should be
    of similar size.
    """
    columns = matrix.shape[1]
    solution, free = np.zeros(columns), np.zeros(columns, bool)
    enough = 10 * np.finfo(float).eps * max(matrix.shape) * float(np.abs(matrix.T @ values).max(initial=0.0))
    for _ in range(3 * columns):
        slope = matrix.T @ (values - matrix @ solution)
        slope[free] = -np.inf
        best = int(np.argmax(slope))
        if slope[best] <= enough:
            break
        free[best] = True
        while True:
            trial = np.zeros(columns)
            trial[free] = np.linalg.lstsq(matrix[:, free], values, rcond=None)[0]
            low = free & (trial <= _TINY)
            if not low.any():
                break
            steps = solution[low] / np.maximum(solution[low] - trial[low], _TINY)
            solution = solution + float(steps.min()) * (trial - solution)
            free &= solution > _TINY
            solution[~free] = 0.0
        solution = trial
    return solution


def robust_nonnegative(matrix: Vector, values: Vector) -> tuple[Vector, Vector]:
    """:func:`nonnegative` with Huber's weights, by iteration; (x, the weight of each row, from 0 to 1)."""
    weights = np.ones(len(values))
    inflation = math.sqrt(len(values) / max(len(values) - matrix.shape[1], 1))  # errors are smaller where it was fitted
    for _ in range(_ROUNDS):
        root = np.sqrt(weights)
        solution = nonnegative(matrix * root[:, None], values * root)
        errors = np.abs(values - matrix @ solution)
        spread = max(inflation * float(np.median(errors)) / 0.6745, _TINY)  # of normal errors
        fresh = np.minimum(1.0, _HUBER * spread / np.maximum(errors, _TINY))
        if np.allclose(fresh, weights, atol=1e-3):
            break
        weights = fresh
    return solution, weights


def left_out(matrix: Vector, values: Vector, weights: Vector) -> Vector:
    """What :func:`nonnegative` on all other rows, by their weights, predicts of each: (n, k), (n,), (n,) to (n,)."""
    root = np.sqrt(weights)
    weighted, wanted = matrix * root[:, None], values * root
    found = np.empty(len(values))
    for row, times in enumerate(matrix):
        found[row] = times @ nonnegative(np.delete(weighted, row, axis=0), np.delete(wanted, row))
    return found
