"""How long a step of the decoder may take, and what follows when it takes longer: its thread is given up.

Nothing can interrupt a call of an engine. So whoever waited for it is looked after by somebody else, and the thread
that hangs finds, should it ever come back, that it has nothing to do any more.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from devices.base import Decoder, Forward, Step
from edge_runtime.errors import StepTimeout
from edge_runtime.heartbeat import Heartbeat
from edge_runtime.stuck import free, stuck

STEP_TIMEOUT_S = 30.0
"""That every step may take, however short it should be."""
PATIENCE = 20.0
"""So many times what was measured; contexts grow, and machines get busy."""
UNMEASURED = 10.0
"""Before anything was measured, so many times :data:`STEP_TIMEOUT_S`: engines compile with their first step."""
_FORGETTING = 0.99
"""What the slowest step still counts after another one."""


class Abandoned(BaseException):
    """The step has taken too long, and somebody else looks after its requests. The thread must touch nothing more."""


class StepPace:
    """What steps have taken, by powers of two of their tokens."""

    def __init__(self, least: float) -> None:
        """``least``: seconds that every step may take."""
        self._least = least
        self._slowest: dict[int, float] = {}

    def limit(self, tokens: int) -> float:
        """Seconds that a step of so many tokens may take. It should take no longer than one of more tokens did, and
        than one of fewer did in proportion."""
        if not self._slowest:
            return self._least * UNMEASURED
        expected: float = min(seconds * max(1.0, tokens / 2**size) for size, seconds in self._slowest.items())
        return max(self._least, PATIENCE * expected)

    def took(self, tokens: int, seconds: float) -> None:
        size = tokens.bit_length() - 1
        self._slowest[size] = max(seconds, self._slowest.get(size, 0.0) * _FORGETTING)


class _Step(NamedTuple):
    device: str
    tokens: int
    began: float
    thread: threading.Thread


class StepWatch:
    """Of one engine, whose thread runs one step at a time."""

    def __init__(self, least: float, heartbeat: Heartbeat, given_up: Callable[[StepTimeout], None]) -> None:
        """``least``: as for :class:`StepPace`. ``given_up`` is called, once, on a thread of its own."""
        self.least = least
        self._heartbeat = heartbeat
        self._given_up = given_up
        self._lock = threading.Lock()
        """Guards what follows: whether a step has ended in time is decided once."""
        self._running: _Step | None = None
        self._allowed = 0.0
        self._most = float("inf")
        self.abandoned = False
        self._leave = heartbeat.call(self._look)

    def guard(self, decoder: Decoder) -> Forward:
        """Its ``forward``, which raises Abandoned where it comes back too late."""
        pace = StepPace(self.least)

        def forward(steps: Sequence[Step]) -> list[NDArray[np.float32]]:
            with self.step(decoder.device, sum(len(step.tokens) for step in steps), pace):
                return decoder.forward(steps)

        return forward

    @contextmanager
    def step(self, device: str, tokens: int, pace: StepPace) -> Iterator[None]:
        """A step of so many tokens on this thread; Abandoned at its end where that comes too late."""
        awake = self._heartbeat.awake
        with self._lock:
            self._running = _Step(device, tokens, awake, threading.current_thread())
            self._allowed = min(pace.limit(tokens), self._most)
        started = time.perf_counter()
        try:
            yield
        finally:
            taken = time.perf_counter() - started
            self._ended()
            # what the process slept through was not the step's
            pace.took(tokens, min(taken, self._heartbeat.awake - awake + 2 * self._heartbeat.interval))

    def hurry(self, seconds: float) -> None:
        """Nobody waits for steps any more: from now on none may take longer than that."""
        with self._lock:
            self._most = seconds
            if self._running is not None:
                self._allowed = min(self._allowed, self._heartbeat.awake - self._running.began + seconds)

    def close(self) -> None:
        self._leave()

    def _ended(self) -> None:
        with self._lock:
            self._running = None
            if self.abandoned:
                free(threading.current_thread())
                raise Abandoned

    def _look(self) -> None:
        with self._lock:
            if self._running is None or self.abandoned:
                return
            device, tokens, began, thread = self._running
            taken = self._heartbeat.awake - began
            if taken <= self._allowed:
                return
            self.abandoned = True
            stuck(thread)
        error = StepTimeout(
            f"{device} hangs: a step of {tokens} token{'s' * (tokens != 1)} has taken {taken:.0f} s and may take "
            f"{self._allowed:.0f} s (--step-timeout); its thread is given up"
        )
        threading.Thread(target=self._given_up, args=(error,), name="edge-glm taking over", daemon=True).start()
