"""A machine of which every time is known: what the search would measure, without measuring."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edge_runtime.errors import EdgeError
from edge_runtime.measurements import Shape
from edge_runtime.tuning.records import Figures, Run, Setup
from edge_runtime.tuning.space import Scope

HERE = "a processor, 4 cores"
SHAPE = Shape(512, 64, 1)
DEFAULT = Setup("edge:cpu")
DEVICES = ("edge:cpu", "onnxruntime:cpu", "openvino:cpu")


def scope(**changes: object) -> Scope:
    values = {"devices": DEVICES, "shape": SHAPE, "weights": "int4", **changes}
    return Scope(**values)  # type: ignore[arg-type]


def new_run(**changes: object) -> Run:
    values = {
        "started": "2026-11-26T10:00:00+00:00",
        "machine": HERE,
        "versions": {"edge-glm": "0.1.0"},
        "load_average": 0.1,
        "model": "m",
        "variants": dict.fromkeys(DEVICES, "0"),
        "weights": "int4",
        "workload": "one",
        "shape": SHAPE,
        "limit_s": 10_000.0,
        "default": DEFAULT,
        "candidate": DEFAULT,
        "trials": [],
        "verdicts": [],
        **changes,
    }
    return Run(**values)  # type: ignore[arg-type]


class Machine:
    """``seconds`` tells how long a request takes with a setup, or raises; each time off by ``noise`` (its logarithm's
    standard deviation). A trial takes two seconds and three requests."""

    def __init__(self, seconds: Callable[[Setup], float], noise: float = 0.0, seed: int = 0) -> None:
        self._seconds, self._noise = seconds, noise
        self._rng = np.random.default_rng(seed)
        self.now = 100.0
        self.asked: list[Setup] = []
        self.scored: list[Setup] = []
        self.nll: Callable[[Setup], float] = lambda setup: 3.0
        self.before: Callable[[int], None] = lambda count: None
        """Called before each trial with how many there were."""

    def clock(self) -> float:
        return self.now

    def measure(self, setup: Setup, score: bool, limit_s: float) -> Figures:
        self.before(len(self.asked))
        self.asked.append(setup)
        took = 2.0
        try:
            seconds = self._seconds(setup) * float(np.exp(self._rng.normal(0, self._noise)))
            took += 3 * seconds
            if took > limit_s:
                took = limit_s
                raise EdgeError(f"it took more than the {limit_s:.0f} s that it was given")
        finally:
            self.now += took
        if score:
            self.scored.append(setup)
        return Figures(seconds, 512 / seconds, 64 / seconds, self.nll(setup) if score else None)
