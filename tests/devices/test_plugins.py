"""Execution providers of other packages, over packages and an ONNX Runtime of the tests' own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest

from devices import plugins
from devices.discovery import facts, probe_device
from devices.errors import DeviceUnavailable
from devices.names import RUNNABLE
from devices.plugins import PLUGINS, plugin_hardware

Install = Callable[[str, str], None]


def hardware(provider: str, kind: str, **metadata: str) -> Any:
    return SimpleNamespace(
        ep_name=provider,
        device=SimpleNamespace(type=SimpleNamespace(name=kind), vendor="Somebody", metadata=metadata),
    )


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Makes the plugin of a device importable, in place of one that is installed; registering appends to
    ``registered``."""
    monkeypatch.setattr(plugins, "_registered", cache(plugins._registered.__wrapped__))
    monkeypatch.syspath_prepend(tmp_path)
    real: dict[str, Any] = {}

    def install_(name: str, source: str) -> None:
        module = PLUGINS[name].module
        (tmp_path / f"{module}.py").write_text(source)
        real[module] = sys.modules.pop(module, None)

    yield install_
    for name, module in real.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    calls: list[tuple[str, str]] = []
    listed = [
        hardware("CPUExecutionProvider", "CPU"),
        hardware("WebGpuExecutionProvider", "GPU", Description="Radeon 780M"),
        hardware("MLXExecutionProvider", "GPU"),
    ]
    monkeypatch.setattr(
        onnxruntime, "register_execution_provider_library", lambda name, path: calls.append((name, path))
    )
    monkeypatch.setattr(onnxruntime, "get_ep_devices", lambda: listed)
    return calls


USUAL = """
def get_library_path(): return "/somewhere/lib.so"
def get_ep_names(): return ["{}"]
"""


def test_hardware_of_a_plugin(install: Install, registered: list[tuple[str, str]]) -> None:
    install("onnxruntime:webgpu", USUAL.format("WebGpuExecutionProvider"))
    (found,) = plugin_hardware("onnxruntime:webgpu")
    assert plugins.describe(found) == "GPU Radeon 780M"
    plugin_hardware("onnxruntime:webgpu")
    assert registered == [("WebGpuExecutionProvider", "/somewhere/lib.so")]  # once
    device = probe_device("onnxruntime:webgpu")
    assert (device.hardware, device.ready) == ("GPU Radeon 780M", True)
    assert not plugins.on_processor("onnxruntime:webgpu")


def test_a_plugin_with_names_of_its_own(install: Install, registered: list[tuple[str, str]], tmp_path: Path) -> None:
    source = "def library_path(): return '/mlx.dylib'\ndef ep_name(): return 'MLXExecutionProvider'\n"
    install("onnxruntime:mlx", source)
    (found,) = plugin_hardware("onnxruntime:mlx")
    assert plugins.describe(found) == "GPU Somebody"
    assert registered == [("MLXExecutionProvider", "/mlx.dylib")]


def test_a_plugin_that_is_not_run(install: Install, registered: list[tuple[str, str]]) -> None:
    install("onnxruntime:mlx", USUAL.format("MLXExecutionProvider"))
    assert probe_device("onnxruntime:mlx").problem == "it is here, but this version does not run it; use --device cpu"


def test_what_the_openvino_provider_is_told() -> None:
    assert plugins.plugin_options("onnxruntime:webgpu", 3) == {}
    told = json.loads(plugins.plugin_options("onnxruntime:openvino", 3)["load_config"])
    assert told == {"CPU": {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": "3"}}
    assert "INFERENCE_NUM_THREADS" not in plugins.plugin_options("onnxruntime:openvino", None)["load_config"]


def test_no_hardware(install: Install, registered: list[tuple[str, str]]) -> None:
    install("onnxruntime:qnn", USUAL.format("QNNExecutionProvider"))
    with pytest.raises(DeviceUnavailable, match="onnxruntime-qnn finds no hardware that it can use here; check the"):
        plugin_hardware("onnxruntime:qnn")


@pytest.mark.parametrize(
    "source", ["raise OSError('no libsomething')", "", USUAL.format("OpenVINOExecutionProvider")], ids=str
)
def test_a_plugin_that_does_not_load(source: str, install: Install) -> None:
    """Its code, its functions, its library: none is ours."""
    install("onnxruntime:openvino", source)
    with pytest.raises(DeviceUnavailable, match=r"onnxruntime-ep-openvino does not load \(.*pip install -U"):
        plugin_hardware("onnxruntime:openvino")


@pytest.mark.parametrize("name", PLUGINS)
def test_absent_packages(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plugins._registered.cache_clear()
    monkeypatch.setattr(plugins, "find_spec", lambda module: None)
    with pytest.raises(DeviceUnavailable, match=f"pip install {PLUGINS[name].distribution}"):
        plugin_hardware(name)
    device = probe_device(name)
    told = f"the package is not installed; pip install {PLUGINS[name].distribution}"
    if name not in RUNNABLE:
        told = "this version does not run it (the package is not installed); use --device cpu"
    assert device.problem == told
    assert facts(device).memory is None


def test_an_onnxruntime_that_takes_none(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("onnxruntime:webgpu", USUAL.format("WebGpuExecutionProvider"))
    monkeypatch.delattr(onnxruntime, "register_execution_provider_library")
    with pytest.raises(DeviceUnavailable, match="takes no plugins; install"):
        plugin_hardware("onnxruntime:webgpu")
