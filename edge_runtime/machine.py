"""Which machine this is, and with which engines."""

from __future__ import annotations

from devices.host import cores, processor
from edge_runtime.version import installed, version

LIBRARIES = ("onnxruntime", "onnxruntime-gpu", "openvino", "numpy", "tokenizers")


def versions() -> dict[str, str]:
    """Of this distribution and of what computes with it."""
    return {"edge-glm": version(), **installed(LIBRARIES)}


def fingerprint() -> str:
    """In words; another one after any change that may change how fast the devices here are."""
    return ", ".join([processor(), f"{cores()} cores", *(f"{name} {number}" for name, number in versions().items())])
