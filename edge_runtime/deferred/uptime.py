"""A clock that nobody sets, and which run of the machine it is of."""

from __future__ import annotations

import time
import uuid
from pathlib import Path

_BOOT = Path("/proc/sys/kernel/random/boot_id")


def uptime() -> float:
    """Seconds since the machine was started, those in which it slept included where the system counts them."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


def boot_id() -> str:
    """Another one after each start of the machine; where the system does not tell, of the process."""
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return _PROCESS


_PROCESS = uuid.uuid4().hex
