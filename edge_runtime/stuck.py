"""Threads inside calls that nothing can end: an engine's step that hangs, a model that is still being opened.

The interpreter would wait for them at its end, or tear down what they are in.
"""

from __future__ import annotations

import os
import sys
import threading

_threads: set[threading.Thread] = set()


def stuck(thread: threading.Thread) -> None:
    """Nobody waits for it any more."""
    _threads.add(thread)


def free(thread: threading.Thread) -> None:
    """It has come back after all."""
    _threads.discard(thread)


def any_stuck() -> bool:
    return bool(_threads)


def leave(code: int) -> int:
    """``code``, for the end of the process; which is here where a thread is stuck. All else must be closed."""
    if any_stuck():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
