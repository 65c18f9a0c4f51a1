"""What devices are called, which engine each belongs to, and what would make an absent one usable."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from devices.errors import UnknownDevice

if TYPE_CHECKING:
    from devices.base import Engine

PREFERENCE: tuple[str, ...] = ("onnxruntime:cuda", "edge:cpu", "onnxruntime:cpu", "openvino:cpu")
"""What ``auto`` tries, best first, where nothing was measured on this machine (edge_runtime/measurements.py).

An NVIDIA GPU, where there is one, reads weights ten times as fast as a processor. Then our own kernels (``edge``) in
ONNX Runtime, where they were built and the processor has what they need. Of the engines' own, ONNX Runtime is the
faster one at decoding one stream, starts sooner and takes less memory; OpenVINO is the faster one at prefill, with many
streams and at long contexts. How much is in tests/bench/NOTES.md. Devices not named here are used only when asked for;
``openvino:npu-emulated``, which is for tests, by its full name only.
"""

OPTIONAL = frozenset(name for name in PREFERENCE if not name.endswith(":cpu"))
"""Those of them that not every machine has; where one is not here, nothing is said of it."""

ALIASES: dict[str, tuple[str, ...]] = {
    "auto": PREFERENCE,
    "cpu": tuple(name for name in PREFERENCE if name.endswith(":cpu")),
    "gpu": ("openvino:gpu",),
    "npu": ("openvino:npu",),
    "cuda": ("onnxruntime:cuda",),
    "coreml": ("onnxruntime:coreml",),
    "webgpu": ("onnxruntime:webgpu",),
}


class Known(NamedTuple):
    """A device that we know of, whether or not it is here."""

    engine: Engine
    own_name: str
    """The engine's name for the hardware."""
    remedy: str = "reinstall it"
    """What to do where the engine does not find it."""
    compiles: bool = False
    """Opening a model compiles it for the hardware, which can take minutes."""


KNOWN: dict[str, Known] = {
    "edge:cpu": Known("onnxruntime-edge", "CPUExecutionProvider"),
    "openvino:cpu": Known("openvino", "CPU"),
    "openvino:gpu": Known("openvino", "GPU", "install the Intel GPU driver (OpenCL), or use --device cpu"),
    "openvino:npu": Known("openvino-npu", "NPU", "install the Intel NPU driver, or use --device cpu", compiles=True),
    "openvino:npu-emulated": Known("openvino-npu", "CPU", compiles=True),
    "onnxruntime:cpu": Known("onnxruntime", "CPUExecutionProvider"),
    "onnxruntime:cuda": Known(
        "onnxruntime-cuda",
        "CUDAExecutionProvider",
        "install onnxruntime-gpu in place of onnxruntime, or use --device cpu",
    ),
    "onnxruntime:coreml": Known(
        "onnxruntime-coreml",
        "CoreMLExecutionProvider",
        "CoreML needs macOS and its onnxruntime wheel; use --device cpu",
        compiles=True,
    ),
    "onnxruntime:coreml-emulated": Known("onnxruntime-coreml", "CPUExecutionProvider"),
    "onnxruntime:webgpu": Known("onnxruntime", "WebGpuExecutionProvider"),
    "onnxruntime:openvino": Known("onnxruntime", "OpenVINOExecutionProvider"),
    "onnxruntime:tensorrt-rtx": Known("onnxruntime", "NvTensorRTRTXExecutionProvider"),
    "onnxruntime:qnn": Known("onnxruntime", "QNNExecutionProvider"),
    "onnxruntime:mlx": Known("onnxruntime", "MLXExecutionProvider"),
}

RUNNABLE = frozenset(
    (
        *PREFERENCE,
        *("onnxruntime:cuda", "onnxruntime:webgpu", "onnxruntime:openvino"),
        *("onnxruntime:coreml", "onnxruntime:coreml-emulated"),
        *("openvino:npu", "openvino:npu-emulated"),
    )
)
"""Devices that have a decoder in this version."""


def device_names() -> tuple[str, ...]:
    """Every name that :func:`parse_device` takes."""
    return (*ALIASES, *KNOWN)


def parse_device(name: str, fallback: bool = False) -> tuple[str, ...]:
    """The devices that ``name`` stands for, as ``engine:hardware``, best first. UnknownDevice if there is none.

    ``fallback``: those of ``auto`` after them.
    """
    key = name.strip().lower()
    if key not in ALIASES and key not in KNOWN:
        raise UnknownDevice(f"unknown device {name!r}; known: {', '.join(device_names())}")
    names = ALIASES.get(key, (key,))
    return tuple(dict.fromkeys((*names, *PREFERENCE))) if fallback else names
