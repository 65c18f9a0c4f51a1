"""Execution providers that come as packages of their own and are registered with ONNX Runtime when they are wanted.

Each package tells where its library is and what its providers are called, most by ``get_library_path()`` and
``get_ep_names()``; ONNX Runtime then lists the hardware that they can use
(https://onnxruntime.ai/docs/execution-providers/plugin-ep-libraries/).
"""

from __future__ import annotations

import json
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

from devices.errors import DeviceUnavailable


class Plugin(NamedTuple):
    distribution: str
    """What pip installs."""
    module: str


PLUGINS: dict[str, Plugin] = {
    "onnxruntime:webgpu": Plugin("onnxruntime-ep-webgpu", "onnxruntime_ep_webgpu"),
    "onnxruntime:openvino": Plugin("onnxruntime-ep-openvino", "onnxruntime_ep_openvino"),
    "onnxruntime:tensorrt-rtx": Plugin("onnxruntime-ep-nv-tensorrt-rtx", "onnxruntime_ep_nv_tensorrt_rtx"),
    "onnxruntime:qnn": Plugin("onnxruntime-qnn", "onnxruntime_qnn"),
    "onnxruntime:mlx": Plugin("onnxruntime-ep-mlx", "onnxruntime_ep_mlx"),
}


def plugin_hardware(name: str) -> tuple[Any, ...]:
    """ONNX Runtime's devices of the plugin, at least one.

    DeviceUnavailable if the package is not installed, cannot be loaded, or finds no hardware.
    """
    distribution = PLUGINS[name].distribution
    if find_spec(PLUGINS[name].module) is None:
        raise DeviceUnavailable(f"the package is not installed; pip install {distribution}")
    try:
        found = _registered(name)
    except DeviceUnavailable:
        raise
    except Exception as error:  # a foreign package's code and library: anything may come
        raise DeviceUnavailable(
            f"{distribution} does not load ({error}); pip install -U {distribution} onnxruntime"
        ) from error
    if not found:
        raise DeviceUnavailable(f"{distribution} finds no hardware that it can use here; check the driver")
    return found


@cache
def _registered(name: str) -> tuple[Any, ...]:
    """What the plugin finds; a library can be registered only once in a process."""
    module = import_module(PLUGINS[name].module)
    import onnxruntime

    if not hasattr(onnxruntime, "register_execution_provider_library"):
        raise DeviceUnavailable(f"onnxruntime {onnxruntime.__version__} takes no plugins; install 1.22 or later")
    mlx = hasattr(module, "ep_name")  # has names of its own for both
    providers = [module.ep_name()] if mlx else list(module.get_ep_names())
    library = module.library_path() if mlx else module.get_library_path()
    # under the provider's own name: some call what they find as they were registered
    onnxruntime.register_execution_provider_library(providers[0], str(library))
    return tuple(each for each in onnxruntime.get_ep_devices() if each.ep_name in providers)


def plugin_options(name: str, threads: int | None) -> dict[str, str]:
    """What the provider is told: OpenVINO computes in float32, as the graph asks, where it would take bfloat16."""
    if name != "onnxruntime:openvino":
        return {}
    properties = {"INFERENCE_PRECISION_HINT": "f32"}
    if threads is not None:
        properties["INFERENCE_NUM_THREADS"] = str(threads)
    return {"load_config": json.dumps({"CPU": properties})}


def plugin_memory(name: str) -> Any:
    """ONNX Runtime's name for the memory of the plugin's device. DeviceUnavailable as for :func:`plugin_hardware`."""
    import onnxruntime

    return plugin_hardware(name)[0].memory_info(onnxruntime.OrtDeviceMemoryType.DEFAULT)


def on_processor(name: str) -> bool:
    """Whether the plugin's device is the CPU, as a software adapter is. DeviceUnavailable."""
    return bool(plugin_hardware(name)[0].device.type.name == "CPU")


def describe(found: Any) -> str:
    """Kind and product of one of ONNX Runtime's devices, as far as it tells."""
    hardware = found.device
    metadata = dict(hardware.metadata)
    product = metadata.get("Description") or metadata.get("description") or hardware.vendor or "unknown"
    return f"{hardware.type.name} {product}".strip()
