"""From signals to a decision: a model of P(the local answer is good enough), and the threshold for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import msgspec
import numpy as np

from edge_runtime.errors import PolicyError
from edge_runtime.routing.logistic import Logistic

SCHEMA = 1
SHIPPED = {"smollm2135m": "smollm2-135m.json"}
"""What a model's names hold, letters and digits only → the calibration that comes with Edge-GLM."""


class Measured(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """On tasks that the calibration had not seen."""

    tasks: int
    good: float
    """Share of local answers that were."""
    auroc_before: float
    auroc_during: float
    auroc_consistent: float
    remote_share: float
    quality: float
    """Of the remote's, at that share."""


class Calibration(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A file of ``edge-glm route calibrate``."""

    schema: int
    model: str
    before: Logistic
    """Over signals of the prompt."""
    during: Logistic
    """Over these and those of the first words."""
    consistent: Logistic
    """Over these and how several continuations agree."""
    threshold: float
    """Local answers less likely to be good are made by a remote tier."""
    remote_below: float
    """By ``before``: the local model is not even asked."""
    measured: Measured | None = None


def read_calibration(path: Path) -> Calibration:
    """PolicyError if it is none."""
    try:
        return _decoded(path.read_bytes(), str(path))
    except OSError as error:
        raise PolicyError(f"cannot read the calibration {path}: {error.strerror or error}") from error


def shipped(*names: str) -> Calibration | None:
    """What comes with Edge-GLM for a model that is called so."""
    plain = ["".join(filter(str.isalnum, name.lower())) for name in names]
    file = next((file for known, file in SHIPPED.items() if any(known in name for name in plain)), None)
    return None if file is None else _decoded((files("edge_runtime.routing") / file).read_bytes(), file)


def _decoded(data: bytes, where: str) -> Calibration:
    try:
        calibration = msgspec.json.decode(data, type=Calibration)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise PolicyError(f"{where} is no calibration: {error}") from error
    if calibration.schema != SCHEMA:
        raise PolicyError(f"{where} is of schema {calibration.schema}, this version reads {SCHEMA}: calibrate anew")
    return calibration


@dataclass(frozen=True)
class Point:
    """What a threshold means."""

    threshold: float
    remote_share: float
    quality: float
    """Mean of what answers are worth, over the remote's."""


def curve(scores: Sequence[float], local: Sequence[float], remote: Sequence[float]) -> list[Point]:
    """Every threshold that makes a difference, from all local to all remote. ``local``, ``remote``: what each one's
    answers are worth, 0 … 1."""
    order = np.argsort(scores, kind="stable")
    s, here, there = (np.asarray(each, np.float64)[order] for each in (scores, local, remote))
    best = max(float(there.sum()), 1e-12)
    total = float(here.sum())
    points = [Point(0.0, 0.0, total / best)]
    for place in range(len(s)):
        total += float(there[place] - here[place])
        if place + 1 == len(s) or s[place + 1] > s[place]:
            above = 1.0 if place + 1 == len(s) else float(s[place] + s[place + 1]) / 2
            points.append(Point(above, (place + 1) / len(s), total / best))
    return points


def threshold_for(points: Sequence[Point], *, share: float | None = None, quality: float | None = None) -> Point:
    """The best with at most a ``share`` of requests going to the remote, or the least with at least a ``quality``."""
    if quality is not None:
        return next((point for point in points if point.quality >= quality), points[-1])
    allowed = [point for point in points if share is None or point.remote_share <= share]
    return max(allowed, key=lambda point: point.quality)
