"""A clock that counts only the time in which this process ran, and calls those who want to look at something regularly.

The monotonic clock goes on while a process is stopped (SIGSTOP, a paused container or virtual machine), and on some
systems while the machine sleeps. Whoever measures others' patience by it finds, on waking up, that all of it is over.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

INTERVAL_S = 1.0
_log = logging.getLogger("edge_glm.heartbeat")


class Heartbeat:
    """Methods may be called from any thread. The thread that beats is started with the first who wants to be called."""

    def __init__(self, interval: float = INTERVAL_S, clock: Callable[[], float] = time.monotonic) -> None:
        """``clock``: monotonic seconds."""
        self.interval = interval
        self.awake = 0.0
        """Seconds, as of the last beat. Of the time between two beats no more counts than twice the interval, as long
        as there is somebody to beat for."""
        self._slept = 0.0
        self._clock = clock
        self._last = clock()
        self._lock = threading.Lock()
        self._calls: dict[int, Callable[[], None]] = {}
        self._next_number = 0
        self._thread: threading.Thread | None = None

    def call(self, regularly: Callable[[], None]) -> Callable[[], None]:
        """``regularly``, which must be quick, after every beat; until what this returns is called."""
        with self._lock:
            number = self._next_number
            self._next_number += 1
            self._calls[number] = regularly
            if self._thread is None:
                self._count()
                self._thread = threading.Thread(target=self._beat_on, name="edge-glm heartbeat", daemon=True)
                self._thread.start()

        def leave() -> None:
            with self._lock:
                self._calls.pop(number, None)

        return leave

    def now(self) -> float:
        """Seconds in which this process was awake."""
        with self._lock:
            self._count()
            return self.awake

    @property
    def slept(self) -> float:
        """Seconds in which it was not, though the clock went on."""
        with self._lock:
            self._count()
            return self._slept

    def beat(self) -> None:
        with self._lock:
            self._count()
            calls = list(self._calls.values())
        for call in calls:
            try:
                call()
            except Exception:  # the others must still be called
                _log.exception("something that looks after the service regularly has failed")

    def _count(self) -> None:
        now = self._clock()
        passed = max(now - self._last, 0.0)
        counted = passed if self._thread is None else min(passed, 2 * self.interval)
        self.awake, self._slept, self._last = self.awake + counted, self._slept + passed - counted, now

    def _beat_on(self) -> None:
        """As long as anybody wants to be called."""
        while True:
            with self._lock:
                if not self._calls:
                    self._thread = None
                    return
            time.sleep(self.interval)
            self.beat()


HEARTBEAT = Heartbeat()
"""The process's."""
