"""Which machine this is, and with which engines."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from edge_runtime.version import installed, version

LIBRARIES = ("onnxruntime", "onnxruntime-gpu", "openvino", "numpy", "tokenizers")


def versions() -> dict[str, str]:
    """Of this distribution and of what computes with it."""
    return {"edge-glm": version(), **installed(LIBRARIES)}


def fingerprint() -> str:
    """In words; another one after any change that may change how fast the devices here are."""
    return ", ".join([processor(), f"{cores()} cores", *(f"{name} {number}" for name, number in versions().items())])


def processor() -> str:
    with suppress(OSError):  # Linux on x86; on ARM the file has no names
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
        if found:
            return found[1].strip()
    if sys.platform == "darwin":
        with suppress(OSError, subprocess.CalledProcessError):
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return platform.processor() or platform.machine() or "unknown"


def cores() -> int:
    """Logical cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
