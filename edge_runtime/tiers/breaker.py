"""A circuit breaker (Nygard, Release It!, 2007): a tier that keeps failing is left alone, then asked once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Literal

LONGEST_WISH_S = 3600.0
"""A server that asks to be left alone for longer is asked again after that: its clock may be wrong, or its words."""
State = Literal["closed", "open", "half-open"]


class Breaker:
    """Of one tier. ``closed``: it is asked. ``open``: it is not, until the cooldown is over. ``half-open``: one request
    tries, the others do not. Methods may be called from any thread; ``clock`` is monotonic seconds."""

    def __init__(
        self, failures: int, cooldown: float, longest: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limit = failures
        self._first_cooldown = cooldown
        self._longest = longest
        self._clock = clock
        self._lock = threading.Lock()
        self._failures = 0
        self._cooldown = cooldown
        self._until: float | None = None
        """When the cooldown is over; None: closed."""
        self._probing = False
        self.reason = ""
        """The last failure, in words."""

    @property
    def state(self) -> State:
        if self._until is None:
            return "closed"
        return "half-open" if self._probing or self._clock() >= self._until else "open"

    @property
    def refusal(self) -> str | None:
        """Why the tier would not be asked now; None: it would."""
        with self._lock:
            return self._refusal()

    def enter(self) -> str | None:
        """As :attr:`refusal`; where it is None a request begins, whose end :meth:`succeeded`, :meth:`failed` or
        :meth:`left` tells."""
        with self._lock:
            refusal = self._refusal()
            if refusal is None and self._until is not None:
                self._probing = True
            return refusal

    def succeeded(self) -> None:
        with self._lock:
            self._failures, self._until, self._probing = 0, None, False
            self._cooldown = self._first_cooldown
            self.reason = ""

    def failed(self, reason: str, retry_after: float | None = None) -> None:
        """``retry_after``: seconds for which the tier itself asks to be left alone, up to :data:`LONGEST_WISH_S`."""
        with self._lock:
            self._failures += 1
            self.reason = reason
            if self._probing:
                self._cooldown = min(2 * self._cooldown, self._longest)
            if self._probing or self._failures >= self._limit or retry_after is not None:
                seconds = self._cooldown if retry_after is None else min(retry_after, LONGEST_WISH_S)
                self._until = self._clock() + seconds
            self._probing = False

    def left(self) -> None:
        """The request ended without saying anything of the tier: it was cancelled, or was at fault itself."""
        with self._lock:
            self._probing = False

    def _refusal(self) -> str | None:
        if self._until is None:
            return None
        left = self._until - self._clock()
        if left > 0:
            return f"it has failed and is left alone for {left:.1f} s more ({self.reason})"
        return f"it has failed ({self.reason}), and another request is trying it" if self._probing else None
