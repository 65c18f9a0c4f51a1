"""SIGTERM, by which services and containers are stopped, from the first moment of a service to its last."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(KeyboardInterrupt):
    """Somebody wants the process to end."""


@contextmanager
def termination_interrupts() -> Iterator[None]:
    """SIGTERM raises Terminated. A second one ends the process at once, as if nothing were here."""
    if threading.current_thread() is not threading.main_thread():  # signals are handled elsewhere
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def once(number: int) -> None:
    """SIGTERM has come: the next one is the system's to handle."""
    if number == signal.SIGTERM:
        signal.signal(number, signal.SIG_DFL)


def _terminate(number: int, frame: FrameType | None) -> None:
    once(number)
    raise Terminated
