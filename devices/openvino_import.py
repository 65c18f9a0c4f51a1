"""Importing OpenVINO without its telemetry.

``import openvino`` sends a usage event to Google Analytics when the package openvino-telemetry is installed, and
pip installs it. A device must not report to anybody, so the package is hidden while openvino is first imported;
openvino then takes its own silent stub.

Its CPU plugin keeps the code that it generates for every number of tokens it meets, a megabyte for each with a small
model, in a cache of its own and once more in oneDNN's. oneDNN reads the size of its cache from the environment only.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

KERNEL_CACHE = "128"
"""Entries of either cache: about fifteen numbers of tokens."""
_ONEDNN_CACHE = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
_TELEMETRY = "openvino_telemetry"


def import_openvino() -> Any:
    """The ``openvino`` module. ImportError if it is not installed."""
    os.environ.setdefault(_ONEDNN_CACHE, KERNEL_CACHE)
    if "openvino" in sys.modules or _TELEMETRY in sys.modules:
        return importlib.import_module("openvino")  # somebody else's import: not ours to silence
    modules: dict[str, Any] = sys.modules
    modules[_TELEMETRY] = None  # what Python documents for "raise ModuleNotFoundError on import"
    try:
        return importlib.import_module("openvino")
    finally:
        del modules[_TELEMETRY]
