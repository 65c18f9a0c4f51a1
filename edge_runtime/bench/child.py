"""The other side of :mod:`edge_runtime.bench.process`: a process that obeys one order.

A process of its own, so that its peak memory is that of running the model, not of fetching and exporting it, and so
that its start can be timed.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable


def serve(obey: Callable[[bytes], bytes]) -> None:
    """Read a line, answer what ``obey`` makes of it, alone on standard output; end with the parent."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # engines print what they like; the answer must be alone
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C too, and ends this process
    order = sys.stdin.buffer.readline()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with answers:
        answers.write(obey(order))


def _end_with_parent() -> None:
    """Whatever ends the parent closes the pipe."""
    os.read(0, 1)
    os._exit(1)
