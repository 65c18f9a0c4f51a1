"""Where to cut: per layer, solved for the least loss that saves as much as is wanted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

EIGHTHS = 8
"""Of a layer's neurons, which are cut in such shares."""
_STEPS = 2000
"""Into which what is to be saved is divided, where it does not count whole things."""


class Option(NamedTuple):
    """Of a part of the network."""

    saved: float
    loss: float
    """Nats a token, by which the output moves when this alone is done."""


def solve(parts: Sequence[Sequence[Option]], wanted: float) -> list[int]:
    """Which option of each part to take, so that ``wanted`` is saved in all at the least sum of losses.

    By dynamic programming over what has been saved so far: exact where savings are whole numbers, else each of them is
    rounded to a 2000th of ``wanted``. The first option of a part is to leave it as it is. ValueError if they cannot
    save so much.
    """
    if wanted <= 0:
        return [0] * len(parts)
    if sum(max(option.saved for option in part) for part in parts) < wanted:
        raise ValueError("the parts together do not save so much")
    whole = all(float(option.saved).is_integer() for part in parts for option in part) and wanted <= _STEPS
    steps = math.ceil(wanted) if whole else _STEPS
    size = 1.0 if whole else wanted / _STEPS
    least = np.full(steps + 1, np.inf)
    least[0] = 0.0
    taken = np.zeros((len(parts), steps + 1), np.int16)
    came = np.zeros((len(parts), steps + 1), np.int32)
    for index, part in enumerate(parts):
        best = np.full(steps + 1, np.inf)
        for number, option in enumerate(part):
            cost = least + option.loss
            shift = min(max(round(option.saved / size), 0), steps)  # times are measured: less may seem to take longer
            sources = np.arange(steps + 1 - shift)
            if shift:  # all that would save more than is wanted ends at what is wanted
                end = steps - shift
                sources[-1] = end + int(cost[end:].argmin())
            better = cost[sources] < best[shift:]
            targets, sources = np.arange(shift, steps + 1)[better], sources[better]
            best[targets] = cost[sources]
            taken[index, targets], came[index, targets] = number, sources
        least = best
    place, chosen = int(np.flatnonzero(np.isfinite(least))[-1]), []  # rounded, all together may be a step short
    for index in reversed(range(len(parts))):
        chosen.append(int(taken[index, place]))
        place = int(came[index, place])
    return chosen[::-1]


def group_options(losses: Sequence[float], saved: Sequence[float]) -> list[Option]:
    """Without 0, 1, … of a layer's KV groups, whose ``losses`` they are; one stays. ``saved``: by 0, 1, …"""
    least = sorted(losses)
    return [Option(saved[count], sum(least[:count])) for count in range(len(least))]


def neuron_options(shares: Sequence[float], losses: Sequence[float], saved: Sequence[float]) -> list[Option]:
    """Without 0, an eighth, … seven eighths of a layer's neurons. ``losses``: without ``shares`` of them; ``saved``: by
    0, an eighth, …"""
    known = [0.0, *shares, 1.0], [0.0, *losses, 2 * losses[-1]]
    return [Option(saved[count], float(np.interp(count / EIGHTHS, *known))) for count in range(EIGHTHS)]
