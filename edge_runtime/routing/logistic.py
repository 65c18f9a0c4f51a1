"""Logistic regression over named signals, and how well it tells good from bad."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

FARTHEST = 3.0
"""Standard deviations from the mean beyond which a signal counts no further: what was never seen says little."""


class Logistic(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """P(good) of signals by name. One that is missing counts as its mean."""

    names: tuple[str, ...]
    mean: tuple[float, ...]
    scale: tuple[float, ...]
    weights: tuple[float, ...]
    bias: float

    def __call__(self, signals: Mapping[str, float]) -> float:
        total = self.bias
        for name, mean, scale, weight in zip(self.names, self.mean, self.scale, self.weights, strict=True):
            value = (signals.get(name, mean) - mean) / scale
            total += weight * min(max(value, -FARTHEST), FARTHEST)
        return float(1 / (1 + np.exp(-total)))


def fit(rows: Sequence[Mapping[str, float]], good: Sequence[float], penalty: float) -> Logistic:
    """By Newton's method. ``good``: 0 … 1 for each row; ``penalty``: of the squared weights (ridge, 1/variance of a
    prior). Signals that never change get no weight. ValueError if all rows are good, or all bad."""
    names = sorted({name for row in rows for name in row})
    values = np.array([[row.get(name, np.nan) for name in names] for row in rows], np.float64)
    target = np.asarray(good, np.float64)
    if not 0 < target.mean() < 1:
        raise ValueError("there must be good and bad answers to tell apart")
    mean = np.nanmean(values, axis=0)
    scale = np.nanstd(values, axis=0)
    changing = scale > 1e-9
    scale[~changing] = 1
    standard = np.clip(np.nan_to_num((values - mean) / scale) * changing, -FARTHEST, FARTHEST)
    weights, bias = _newton(standard, target, penalty)
    return Logistic(
        tuple(names), tuple(mean.tolist()), tuple(scale.tolist()), tuple((weights * changing).tolist()), bias
    )


def _newton(x: NDArray[np.float64], target: NDArray[np.float64], penalty: float) -> tuple[NDArray[np.float64], float]:
    x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    ridge = np.eye(x.shape[1]) * penalty
    ridge[-1, -1] = 1e-6  # the bias is free
    weights = np.zeros(x.shape[1])
    for _ in range(50):
        p = 1 / (1 + np.exp(-np.clip(x @ weights, -30, 30)))
        gradient = x.T @ (p - target) + ridge @ weights
        step = np.linalg.solve((x * (p * (1 - p))[:, None]).T @ x + ridge, gradient)
        weights -= step
        if np.abs(step).max() < 1e-9:
            break
    return weights[:-1], float(weights[-1])


def auroc(scores: Sequence[float], good: Sequence[float]) -> float:
    """Area under the ROC curve: the chance that a good one scores above a bad one, ties counting half (Hanley and
    McNeil, 1982). NaN if all are good, or all bad."""
    s, y = np.asarray(scores, np.float64), np.asarray(good, np.float64) > 0.5
    _, place, counts = np.unique(s, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks = (ends - (counts - 1) / 2)[place]
    ones, zeros = int(y.sum()), int((~y).sum())
    if not ones or not zeros:
        return float("nan")
    return float((ranks[y].sum() - ones * (ones + 1) / 2) / (ones * zeros))


def roc(scores: Sequence[float], good: Sequence[float]) -> list[tuple[float, float]]:
    """(share of the bad, share of the good) that score above a threshold, for all thresholds, (0, 0) to (1, 1)."""
    order = np.argsort(-np.asarray(scores), kind="stable")
    y = np.asarray(good)[order] > 0.5
    s = np.asarray(scores)[order]
    last = np.append(s[1:] != s[:-1], True)
    good_share = np.cumsum(y) / max(y.sum(), 1)
    bad_share = np.cumsum(~y) / max((~y).sum(), 1)
    return [(0.0, 0.0), *zip(bad_share[last].tolist(), good_share[last].tolist(), strict=True)]
