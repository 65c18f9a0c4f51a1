"""Which devices exist here, and how a name becomes an open decoder.

A device is an engine and the hardware it runs on, written ``engine:hardware`` (``openvino:cpu``); ``edge`` is ONNX
Runtime with operators of our own. Short names
(``cpu``, ``auto``, …) stand for several, in the order of :data:`PREFERENCE`. Engines are imported only when one
of their devices is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from devices.errors import DeviceUnavailable, UnknownDevice

if TYPE_CHECKING:
    from devices.base import Decoder, DecoderOptions, DecoderSpec, Engine

PREFERENCE: tuple[str, ...] = ("edge:cpu", "onnxruntime:cpu", "openvino:cpu")
"""What ``auto`` tries, best first, where nothing was measured on this machine (edge_runtime/measurements.py).

First our own kernels (``edge``) in ONNX Runtime, where they were built and the processor has what they need. Of the
engines' own, ONNX Runtime is the faster one at decoding one stream, starts sooner and takes less memory; OpenVINO is
the faster one at prefill, with many streams and at long contexts. How much is in tests/bench/NOTES.md. Devices not
named here are used only when asked for.
"""

_ALIASES: dict[str, tuple[str, ...]] = {
    "auto": PREFERENCE,
    "cpu": tuple(name for name in PREFERENCE if name.endswith(":cpu")),
    "gpu": ("openvino:gpu",),
    "npu": ("openvino:npu",),
    "cuda": ("onnxruntime:cuda",),
    "coreml": ("onnxruntime:coreml",),
}

_KNOWN: dict[str, tuple[Engine, str]] = {
    # name → engine, and the engine's own name for the hardware
    "edge:cpu": ("onnxruntime-edge", "CPUExecutionProvider"),
    "openvino:cpu": ("openvino", "CPU"),
    "openvino:gpu": ("openvino", "GPU"),
    "openvino:npu": ("openvino", "NPU"),
    "onnxruntime:cpu": ("onnxruntime", "CPUExecutionProvider"),
    "onnxruntime:cuda": ("onnxruntime-cuda", "CUDAExecutionProvider"),
    "onnxruntime:coreml": ("onnxruntime", "CoreMLExecutionProvider"),
}

ONNXRUNTIME_CPU = (1, 32)
"""The first version that runs graphs made for its CPU provider."""

_HOW_TO: dict[str, str] = {
    "openvino:gpu": "install the Intel GPU driver (OpenCL) or use --device cpu",
    "openvino:npu": "install the Intel NPU driver or use --device cpu",
    "onnxruntime:cuda": "install onnxruntime-gpu in place of onnxruntime, or use --device cpu",
    "onnxruntime:coreml": "CoreML needs macOS and its onnxruntime wheel; use --device cpu",
}

_RUNNABLE = frozenset((*PREFERENCE, "onnxruntime:cuda"))
"""Devices that have a decoder in this version."""


Order = Callable[[Sequence[str]], Sequence[str]]
"""Names of devices, best first → the same in another order."""


@dataclass(frozen=True)
class Device:
    """A device as found on this machine."""

    name: str
    """``engine:hardware``."""
    engine: Engine
    hardware: str
    """The product's name where the engine tells it, else the engine's name for it."""
    problem: str | None = None
    """Why it cannot be used, and what would change that. None: ready."""

    @property
    def ready(self) -> bool:
        return self.problem is None


def device_names() -> tuple[str, ...]:
    """Every name that :func:`parse_device` takes."""
    return (*_ALIASES, *_KNOWN)


def parse_device(name: str) -> tuple[str, ...]:
    """The devices that ``name`` stands for, as ``engine:hardware``, best first. UnknownDevice if there is none."""
    key = name.strip().lower()
    if key in _ALIASES:
        return _ALIASES[key]
    if key in _KNOWN:
        return (key,)
    raise UnknownDevice(f"unknown device {name!r}; known: {', '.join(device_names())}")


def list_devices() -> list[Device]:
    """Every known device and whether it can be used here. Imports both engines."""
    return [probe_device(name) for name in _KNOWN]


def choose_device(
    name: str = "auto", engines: Collection[str] | None = None, order: Order = lambda names: names
) -> Device:
    """The best usable device that ``name`` stands for, among those of ``engines`` (None: any).

    ``order`` puts the candidates in another order than :data:`PREFERENCE`'s, as measurements may.

    UnknownDevice, or DeviceUnavailable naming why each candidate is not usable.
    """
    reasons = []
    for candidate in order(parse_device(name)):
        engine = _KNOWN[candidate][0]
        if engines is not None and engine not in engines:
            reasons.append(f"{candidate}: the model has no {engine} variant (export --engine {_export_name(engine)})")
            continue
        device = probe_device(candidate)
        if device.problem is None:
            return device
        reasons.append(f"{candidate}: {device.problem}")
    raise DeviceUnavailable(f"device {name!r} cannot be used here: " + "; ".join(reasons))


def _export_name(engine: Engine) -> str:
    """What ``edge-glm export --engine`` calls it."""
    return engine.replace("onnxruntime", "onnx")


def open_decoder(spec: DecoderSpec, device: str, options: DecoderOptions) -> Decoder:
    """Open ``spec`` on ``device``. UnknownDevice, DeviceUnavailable, EngineError."""
    chosen = choose_device(device, {spec.engine})
    if chosen.engine == "openvino":
        from devices.openvino_open import open_openvino

        return open_openvino(spec, options, device=_KNOWN[chosen.name][1])
    if chosen.engine == "onnxruntime-cuda":
        from devices.onnxruntime_cuda import OnnxRuntimeCudaDecoder

        return OnnxRuntimeCudaDecoder(spec, options)
    if chosen.engine == "onnxruntime-edge":
        from devices.onnxruntime_edge import OnnxRuntimeEdgeDecoder

        return OnnxRuntimeEdgeDecoder(spec, options)
    from devices.onnxruntime_gqa import OnnxRuntimeDecoder

    return OnnxRuntimeDecoder(spec, options)


def probe_device(name: str) -> Device:
    """The device of that full name, ``engine:hardware``, and whether it can be used here. KeyError: there is none."""
    engine, own_name = _KNOWN[name]
    library = engine.split("-")[0]
    try:
        hardware = (_openvino_devices if library == "openvino" else _onnxruntime_devices)()
    except ImportError as error:
        return Device(name, engine, own_name, f"{library} does not load ({error}); pip install {library}")
    if own_name not in hardware:
        return Device(
            name, engine, own_name, f"{library} finds no {own_name} here; {_HOW_TO.get(name, 'reinstall it')}"
        )
    if name not in _RUNNABLE:
        problem = f"it is present, but this version runs {' and '.join(sorted(_RUNNABLE))} only; use --device cpu"
        return Device(name, engine, hardware[own_name], problem)
    if name == "onnxruntime:cuda":
        return _probe_cuda(name, engine, own_name)
    if name == "edge:cpu":
        return _probe_edge(name, engine, own_name)
    if name == "onnxruntime:cpu":
        return Device(name, engine, hardware[own_name], _too_old())
    return Device(name, engine, hardware[own_name])


def _probe_cuda(name: str, engine: Engine, own_name: str) -> Device:
    """The provider is listed wherever it is compiled in; whether there is a GPU only CUDA knows."""
    from devices.cuda_memory import CudaRuntime

    try:
        return Device(name, engine, CudaRuntime().product)
    except DeviceUnavailable as error:
        return Device(name, engine, own_name, str(error))


def _probe_edge(name: str, engine: Engine, own_name: str) -> Device:
    from devices.edge_kernels import instructions

    try:
        return Device(name, engine, f"CPU with Edge-GLM's kernels ({instructions()})")
    except DeviceUnavailable as error:
        return Device(name, engine, own_name, str(error))


def _too_old() -> str | None:
    """Why this ONNX Runtime cannot run our CPU graphs; onnxruntime-gpu appears later than onnxruntime."""
    import onnxruntime

    if tuple(int(part) for part in onnxruntime.__version__.split(".")[:2]) >= ONNXRUNTIME_CPU:
        return None
    needed = ".".join(map(str, ONNXRUNTIME_CPU))
    return (
        f"onnxruntime is {onnxruntime.__version__}, its GroupQueryAttention has no query_seqlens before {needed}; "
        "use --device openvino:cpu or cuda, or install a later one"
    )


def _openvino_devices() -> dict[str, str]:
    """OpenVINO's name → product name; ``GPU.0`` counts as ``GPU``."""
    from devices.openvino_import import import_openvino

    core = import_openvino().Core()
    found: dict[str, str] = {}
    for device in core.available_devices:
        found.setdefault(device.split(".")[0], str(core.get_property(device, "FULL_DEVICE_NAME")))
    return found


def _onnxruntime_devices() -> dict[str, str]:
    """Execution provider → description."""
    import onnxruntime

    return {provider: provider for provider in onnxruntime.get_available_providers()}
