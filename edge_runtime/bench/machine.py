"""What this machine is, and what this process took of it."""

from __future__ import annotations

import os
import platform
import re
import sys
from contextlib import suppress
from pathlib import Path

from devices.host import cores, processor
from edge_runtime.bench.result import Machine
from edge_runtime.machine import versions


def this_machine() -> Machine:
    return Machine(
        cpu=processor(),
        cores=cores(),
        memory_bytes=_memory(),
        os=platform.platform(),
        python=platform.python_version(),
        load_average=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        versions=versions(),
    )


def peak_rss_bytes() -> int | None:
    """The most memory this process has had resident; None on Windows."""
    # getrusage will not do on Linux: there a process inherits the peak of the one that started it
    with suppress(OSError):
        found = re.search(r"^VmHWM:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
        if found:
            return int(found[1]) * 1024
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None
