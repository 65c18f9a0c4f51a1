"""What is said of devices beyond whether they can be used."""

from __future__ import annotations

import sys
from typing import Any, ClassVar

import onnxruntime
import pytest

from devices import discovery
from devices.discovery import Device, facts, list_devices, probe_device
from devices.host import Memory, instructions


def test_processors() -> None:
    found = {device.name: facts(device) for device in list_devices() if device.name.endswith(":cpu")}
    for name, known in found.items():
        assert known.memory is not None
        assert 0 < known.memory.free < known.memory.total
        assert known.instructions == instructions()
        library = "openvino" if name == "openvino:cpu" else "onnxruntime"
        assert dict(known.versions)[library] == discovery._version(library)


class Core:
    """OpenVINO's, with a GPU and an NPU."""

    properties: ClassVar[dict[tuple[str, str], Any]] = {
        ("GPU", "GPU_DEVICE_TOTAL_MEM_SIZE"): 8000,
        ("GPU", "GPU_MEMORY_STATISTICS"): {"cl_mem": 1000, "usm_device": 500},
        ("NPU", "NPU_DRIVER_VERSION"): 17235,
        ("NPU", "NPU_DEVICE_TOTAL_MEM_SIZE"): 4000,
        ("NPU", "NPU_DEVICE_ALLOC_MEM_SIZE"): 1500,
    }
    available_devices = ("CPU", "GPU.0", "NPU")

    def get_property(self, device: str, name: str) -> Any:
        if name == "FULL_DEVICE_NAME":
            return f"Intel {device}"
        if (device, name) not in self.properties:
            raise RuntimeError(f"no {name}")
        return self.properties[device, name]


def test_what_openvino_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "_openvino_core", Core)
    gpu, npu = probe_device("openvino:gpu"), probe_device("openvino:npu")
    assert (gpu.hardware, npu.hardware) == ("Intel GPU.0", "Intel NPU")
    assert not gpu.ready
    assert facts(gpu).memory == Memory(8000, 6500)
    assert facts(npu).memory == Memory(4000, 2500)
    assert dict(facts(npu).versions)["NPU driver"] == "17235"
    monkeypatch.setattr(Core, "properties", {})
    assert facts(gpu).memory is None


def test_two_builds_of_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert "install onnxruntime-gpu in place of onnxruntime" in str(probe_device("onnxruntime:cuda").problem)
    builds = {"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.1"}
    monkeypatch.setattr(discovery, "_version", builds.get)
    assert str(probe_device("onnxruntime:cuda").problem).endswith(
        "onnxruntime and onnxruntime-gpu overwrite each other: pip uninstall -y onnxruntime onnxruntime-gpu, then pip "
        "install onnxruntime-gpu"
    )


def test_nothing_is_known_of_what_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    known = facts(Device("openvino:npu", "openvino", "NPU", "it is not here"))
    assert known.memory is None
    assert known.instructions == ()
