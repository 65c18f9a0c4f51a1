"""How long the engines' own inference calls take, so that what we add to them can be told apart."""

from __future__ import annotations

import time


class Stopwatch:
    """A context manager; ``seconds`` adds up the time spent inside, ``laps`` counts how often. Not reentrant."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.laps = 0
        self._started = 0.0

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.seconds += time.perf_counter() - self._started
        self.laps += 1
