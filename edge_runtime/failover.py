"""A model on the best device that works: when one fails, it is put aside with its reason and the next takes over."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeVar

from edge_runtime.engine import Engine
from edge_runtime.errors import DeviceUnavailable, EdgeError, EngineError, EngineStopped
from edge_runtime.loading import Loaded
from edge_runtime.placement import Placement

_log = logging.getLogger(__name__)
_REASON = 200
"""Characters of an error that count as its reason; engines can tell long stories."""

T = TypeVar("T")
Place = Callable[[Mapping[str, str]], Placement]
"""Devices that are put aside, each with why → the best of the others. DeviceUnavailable: there is none."""
Load = Callable[[Placement, Callable[[EngineError], Callable[[], Engine] | None]], Loaded]


class Failover:
    """The one device that is in use, and which are not any more. Methods may be called from any thread."""

    def __init__(self, place: Place, load: Load, first: Placement) -> None:
        """Load ``first``, or else what ``place`` gives next.

        Raises what opening the only candidate does, else DeviceUnavailable with the reasons of all.
        """
        self._place = place
        self._load = load
        self._aside: dict[str, str] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._current = self._open(first)

    @property
    def current(self) -> Loaded:
        return self._current

    @property
    def aside(self) -> Mapping[str, str]:
        """Devices that failed → why."""
        return MappingProxyType(self._aside)

    def ask(self, question: Callable[[Loaded], T]) -> T:
        """``question`` of the device in use; again, if another takes over at that moment."""
        while True:
            asked = self._current
            try:
                return question(asked)
            except EngineStopped:
                if asked is self._current:
                    raise

    def close(self) -> None:
        with self._lock:
            self._closed = True
            engine = self._current.engine
        engine.close()

    def _open(self, placement: Placement) -> Loaded:
        """The first that opens, beginning with ``placement``."""
        while True:
            try:
                return self._load(placement, self._succeed)
            except (EngineError, DeviceUnavailable) as error:
                following = self._after(placement, f"it does not open ({_short(error)})")
                if following is None:
                    if len(self._aside) == 1:
                        raise
                    reasons = "; ".join(f"{name}: {why}" for name, why in self._aside.items())
                    raise DeviceUnavailable(f"no device can be used: {reasons}") from error
                _log.warning("%s does not open, %s is used: %s", placement.device.name, following.device.name, error)
                placement = following

    def _after(self, placement: Placement, reason: str) -> Placement | None:
        """What comes after a device that is put aside now; None: nothing does."""
        self._aside[placement.device.name] = reason
        try:
            return self._place(self._aside)
        except EdgeError as error:
            _log.info("nothing takes the place of %s: %s", placement.device.name, error)
            return None

    def _succeed(self, error: EngineError) -> Callable[[], Engine] | None:
        """On the engine's thread: :data:`edge_runtime.engine.Successor`."""
        failed = self._current.placement
        following = self._after(failed, f"it failed ({_short(error)})")
        if following is None:  # it may recover, and there is nothing better
            del self._aside[failed.device.name]
            return None
        _log.warning("%s failed, %s takes over: %s", failed.device.name, following.device.name, error)
        return lambda: self._take_over(following)

    def _take_over(self, placement: Placement) -> Engine:
        loaded = self._open(placement)
        with self._lock:
            self._current = loaded
            closed = self._closed
        if closed:  # meanwhile
            loaded.engine.close()
        return loaded.engine


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= _REASON else f"{text[: _REASON - 1]}…"
