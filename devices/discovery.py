"""What is on this machine: which of the known devices can be used, why the others cannot, and what there is to say.

Engines are imported only when one of their devices is looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

from devices.errors import DeviceError, DeviceUnavailable
from devices.host import Memory, host_memory, instructions, processor
from devices.names import KNOWN, RUNNABLE, Known
from devices.plugins import PLUGINS, describe, plugin_hardware

if TYPE_CHECKING:
    from devices.base import Engine

ONNXRUNTIME_CPU = (1, 32)
"""The first version that runs graphs made for its CPU provider."""
_BUILDS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino")
"""Distributions with the same module: each overwrites the others' files."""


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
    compiles: bool = False
    """Opening a model compiles it for the hardware, which can take minutes."""

    @property
    def ready(self) -> bool:
        return self.problem is None


@dataclass(frozen=True)
class Facts:
    """What else is known of a device that is here."""

    memory: Memory | None = None
    """None: the engine does not tell."""
    instructions: tuple[str, ...] = ()
    """Of a processor."""
    versions: tuple[tuple[str, str], ...] = ()
    """Of the libraries and drivers that it runs with."""


def list_devices() -> list[Device]:
    """Every known device and whether it can be used here. Imports all engines and plugins."""
    return [probe_device(name) for name in KNOWN]


def probe_device(name: str) -> Device:
    """The device of that full name, ``engine:hardware``, and whether it can be used here. KeyError: there is none."""
    known = KNOWN[name]
    try:
        hardware = _hardware(name, known)
    except DeviceUnavailable as error:
        if name in RUNNABLE:
            return Device(name, known.engine, known.own_name, str(error))
        why, _, _ = str(error).partition("; ")  # the rest would bring here what is of no use
        return Device(name, known.engine, known.own_name, f"this version does not run it ({why}); use --device cpu")
    if name not in RUNNABLE:
        return Device(name, known.engine, hardware, "it is here, but this version does not run it; use --device cpu")
    return Device(name, known.engine, hardware, compiles=known.compiles)


def _hardware(name: str, known: Known) -> str:
    """The product. DeviceUnavailable if it is not here or cannot be used, with the next step."""
    if name in PLUGINS:
        if name in RUNNABLE:
            _onnxruntime_cpu()
        return ", ".join(dict.fromkeys(describe(found) for found in plugin_hardware(name)))
    library = known.engine.split("-")[0]
    try:
        found = (_openvino_devices if library == "openvino" else _onnxruntime_devices)()
    except ImportError as error:
        raise DeviceUnavailable(f"{library} does not load ({error}); pip install {library}") from error
    if known.own_name not in found:
        remedy = _conflict() or known.remedy if name == "onnxruntime:cuda" else known.remedy
        raise DeviceUnavailable(f"{library} finds no {known.own_name} here; {remedy}")
    return _CHECKS.get(name, lambda: found[known.own_name])()


def _cuda() -> str:
    """The provider is listed wherever it is compiled in; whether there is a GPU only CUDA knows."""
    from devices.cuda_memory import CudaRuntime

    return CudaRuntime().product


def _edge() -> str:
    from devices.edge_kernels import instructions as kernels

    return f"CPU with Edge-GLM's kernels ({kernels()})"


def _npu_emulated() -> str:
    """NPUW is part of the NPU plugin, which not every build of OpenVINO has."""
    if not _openvino_core().get_versions("NPU"):
        raise DeviceUnavailable("this build of openvino has no NPU plugin; use --device cpu")
    return "emulated: the code for NPUs on the CPU, for tests only"


def _onnxruntime_cpu() -> str:
    """onnxruntime-gpu appears later than onnxruntime."""
    import onnxruntime

    if tuple(int(part) for part in onnxruntime.__version__.split(".")[:2]) < ONNXRUNTIME_CPU:
        needed = ".".join(map(str, ONNXRUNTIME_CPU))
        raise DeviceUnavailable(
            f"onnxruntime is {onnxruntime.__version__}, its GroupQueryAttention has no query_seqlens before {needed}; "
            "use --device openvino:cpu or cuda, or install a later one"
        )
    return processor()


_CHECKS: dict[str, Callable[[], str]] = {
    "onnxruntime:cuda": _cuda,
    "edge:cpu": _edge,
    "onnxruntime:cpu": _onnxruntime_cpu,
    "openvino:npu-emulated": _npu_emulated,
    "onnxruntime:coreml-emulated": lambda: "emulated: the code for CoreML on the CPU, for tests only",
}
"""Devices whose being listed by the engine is not enough; each gives the product's name."""


def _conflict() -> str | None:
    """What to do where a GPU build is installed, but another build's files lie over it."""
    builds = [name for name in _BUILDS if _version(name)]
    if "onnxruntime-gpu" not in builds or len(builds) == 1:
        return None
    names = " ".join(builds)
    return f"{' and '.join(builds)} overwrite each other: pip uninstall -y {names}, then pip install onnxruntime-gpu"


def _openvino_devices() -> dict[str, str]:
    """OpenVINO's name → product name; ``GPU.0`` counts as ``GPU``."""
    core = _openvino_core()
    found: dict[str, str] = {}
    for device in core.available_devices:
        found.setdefault(device.split(".")[0], str(core.get_property(device, "FULL_DEVICE_NAME")))
    return found


def _openvino_core() -> Any:
    from devices.openvino_import import import_openvino

    return import_openvino().Core()


def _onnxruntime_devices() -> dict[str, str]:
    """Execution provider → description."""
    import onnxruntime

    return {provider: provider for provider in onnxruntime.get_available_providers()}


# ---- what else there is to say


def facts(device: Device) -> Facts:
    """Nothing where nothing can be learned."""
    library = device.engine.split("-")[0]
    versions = {build: _version(build) for build in (_BUILDS if library == "onnxruntime" else (library,))}
    found = {name: number for name, number in versions.items() if number is not None}
    if device.name in PLUGINS:
        distribution = PLUGINS[device.name].distribution
        number = _version(distribution)
        found |= {distribution: number} if number else {}
    memory: Memory | None = None
    if device.name.endswith(":cpu"):
        return Facts(host_memory(), instructions(), tuple(found.items()))
    with suppress(DeviceError, ImportError, RuntimeError):
        if device.name == "onnxruntime:cuda":
            memory, driver = _cuda_facts()
            found |= driver
        elif library == "openvino":
            memory, driver = _openvino_facts(KNOWN[device.name].own_name)
            found |= driver
    return Facts(memory, (), tuple(found.items()))


def _cuda_facts() -> tuple[Memory, dict[str, str]]:
    from devices.cuda_memory import CudaRuntime

    runtime = CudaRuntime()
    return runtime.memory(), {"CUDA runtime": runtime.version, "CUDA driver": runtime.driver_version}


def _openvino_facts(own_name: str) -> tuple[Memory | None, dict[str, str]]:
    """Properties of the GPU and NPU plugins; each may lack any."""
    core = _openvino_core()

    def ask(name: str) -> Any:
        with suppress(RuntimeError):
            return core.get_property(own_name, name)
        return None

    driver, total = ask(f"{own_name}_DRIVER_VERSION"), ask(f"{own_name}_DEVICE_TOTAL_MEM_SIZE")
    versions = {} if driver is None else {f"{own_name} driver": str(driver)}
    if total is None:
        return None, versions
    used = ask(f"{own_name}_DEVICE_ALLOC_MEM_SIZE")
    if used is None:
        statistics = ask(f"{own_name}_MEMORY_STATISTICS")
        used = sum(statistics.values()) if isinstance(statistics, dict) else 0
    return Memory(int(total), max(int(total) - int(used), 0)), versions


def _version(distribution: str) -> str | None:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(distribution)
    return None
