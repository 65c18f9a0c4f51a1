"""Where any thread leaves requests for an engine's own, and learns that there is no engine any more."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

from edge_runtime.completion import Request
from edge_runtime.errors import EngineStopped, Overloaded
from edge_runtime.submission import Submission

CLOSED = "the engine has been closed"


class Letter(NamedTuple):
    submission: Submission
    requests: Sequence[Request]


class Inbox:
    """A queue of ``most`` requests at most, those among them that the engine has taken but not begun."""

    def __init__(self, most: int, waiting: Callable[[], int]) -> None:
        """``waiting``: how many of those there are."""
        self._most = most
        self._waiting = waiting
        self._changed = threading.Condition()
        """Guards what follows; the engine's thread may look without."""
        self._letters: list[Letter] = []
        self._stopped: EngineStopped | None = None
        self.closing = False
        """Somebody wants the engine to end."""

    def __len__(self) -> int:
        return len(self._letters)

    @property
    def waiting(self) -> list[Letter]:
        """Those that the engine has not taken yet."""
        return list(self._letters)

    @property
    def queued(self) -> int:
        return len(self._letters) + self._waiting()

    @property
    def open(self) -> bool:
        return self._stopped is None and not self.closing

    def put(self, submission: Submission, requests: Sequence[Request], *, queued_before: bool = False) -> None:
        """Overloaded, unless it was ``queued_before`` elsewhere; EngineStopped."""
        with self._changed:
            if self._stopped is not None:
                raise EngineStopped(str(self._stopped)) from self._stopped
            if self.closing:
                raise EngineStopped(CLOSED)
            if self.queued >= self._most and not queued_before:
                raise Overloaded(f"{self._most} requests are waiting already; try again later")
            self._letters.append(Letter(submission, requests))
            self._changed.notify()

    def put_back(self, letters: Sequence[Letter]) -> None:
        """Before all others."""
        with self._changed:
            self._letters[:0] = letters

    def take(self) -> list[Letter]:
        with self._changed:
            letters, self._letters = self._letters, []
        return letters

    def wait(self, ready: Callable[[], bool], seconds: float | None) -> bool:
        """Until ``ready``, which is asked whenever something has changed; False if it is not, after so long."""
        with self._changed:
            return self._changed.wait_for(ready, seconds)

    def wake(self) -> None:
        """Something has changed."""
        with self._changed:
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self.closing = True
            self._changed.notify()

    def stop(self, error: EngineStopped) -> list[Letter]:
        """What was not taken. Whoever comes from now on gets ``error``."""
        with self._changed:
            self._stopped = error
            letters, self._letters = self._letters, []
        return letters
