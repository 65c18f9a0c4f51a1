"""Device names, and what is said about those that cannot be used."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from devices import DecoderOptions, DecoderSpec, list_devices, open_decoder
from devices.discovery import Device
from devices.errors import DeviceUnavailable, UnknownDevice
from devices.names import KNOWN, PREFERENCE, device_names, parse_device
from devices.registry import choose, choose_device


def test_names() -> None:
    assert parse_device("auto") == PREFERENCE
    assert set(parse_device("cpu")) == {"edge:cpu", "openvino:cpu", "onnxruntime:cpu"}
    assert parse_device("edge:cpu") == ("edge:cpu",)
    assert parse_device(" OpenVINO:CPU ") == ("openvino:cpu",)
    assert parse_device("npu") == ("openvino:npu",)
    assert parse_device("cuda") == ("onnxruntime:cuda",)


@pytest.mark.parametrize("name", ["", "tpu", "openvino", "openvino:", "onnxruntime:npu:0", "cpu0"])
def test_unknown_names_list_the_known(name: str) -> None:
    with pytest.raises(UnknownDevice) as failure:
        parse_device(name)
    assert all(known in str(failure.value) for known in device_names())


def test_list() -> None:
    found = {device.name: device for device in list_devices()}
    assert found["openvino:cpu"].ready
    assert found["onnxruntime:cpu"].ready
    assert found["openvino:cpu"].hardware not in ("", "CPU")  # the processor's name
    for device in found.values():
        library = device.name.split(":")[0]
        assert device.engine.split("-")[0] == ("onnxruntime" if library == "edge" else library)
        assert device.ready or device.problem


def test_choice_follows_preference_and_variants() -> None:
    ready = {device.name for device in list_devices() if device.ready}
    assert choose_device("auto").name == next(name for name in PREFERENCE if name in ready)
    for engine in ("openvino", "onnxruntime"):
        assert choose_device("auto", {engine}).name == f"{engine}:cpu"
        assert choose_device("cpu", {engine}).name == f"{engine}:cpu"


def test_no_variant_for_the_device() -> None:
    with pytest.raises(DeviceUnavailable, match=r"no onnxruntime variant \(export --engine onnx\)"):
        choose_device("onnxruntime:cpu", {"openvino"})
    with pytest.raises(DeviceUnavailable, match=r"no onnxruntime-edge variant \(export --engine onnx-edge\)"):
        choose_device("edge:cpu", {"openvino", "onnxruntime"})


@pytest.mark.skipif(sys.platform == "darwin", reason="CoreML may be here")
def test_absent_hardware_says_why_and_what_next() -> None:
    with pytest.raises(DeviceUnavailable, match=r"onnxruntime finds no CoreML.*--device cpu"):
        choose_device("coreml")


def test_engine_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert choose_device("auto", {"openvino", "onnxruntime"}).name == "onnxruntime:cpu"
    with pytest.raises(DeviceUnavailable, match=r"openvino does not load .*pip install openvino"):
        choose_device("openvino:cpu")


def test_open_checks_the_engine_of_the_variant() -> None:
    spec = DecoderSpec("onnxruntime", Path("/model.onnx"), 1, 1, 1, 16, 32, 64)
    with pytest.raises(DeviceUnavailable, match="no openvino variant"):
        open_decoder(spec, "openvino:cpu", DecoderOptions())


def test_an_onnxruntime_too_old_for_cpu_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "__version__", "1.31.1")
    with pytest.raises(DeviceUnavailable, match=r"onnxruntime is 1\.31\.1, .*before 1\.32; use --device openvino:cpu"):
        choose_device("onnxruntime:cpu")
    assert choose_device("auto", {"openvino", "onnxruntime"}).name == "openvino:cpu"


def test_cuda_is_compiled_in_but_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "cuda_version", "99.0", raising=False)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None, raising=False)
    with pytest.raises(DeviceUnavailable, match="CUDA 99 is not installed"):
        choose_device("cuda")


@pytest.mark.parametrize("problem", [None, "no driver"])
def test_a_gpu_comes_first_and_is_not_missed_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch, problem: str | None
) -> None:
    def probe(name: str) -> Device:
        return Device(name, KNOWN[name].engine, "a", problem=problem if name == "onnxruntime:cuda" else None)

    monkeypatch.setattr("devices.registry.probe_device", probe)
    chosen, passed_over = choose("auto", parse_device("auto"))
    assert chosen.name == ("onnxruntime:cuda" if problem is None else "edge:cpu")
    assert passed_over == ()
    chosen, passed_over = choose("auto", parse_device("auto"), {"onnxruntime-edge"})
    assert chosen.name == "edge:cpu"
    export = "onnxruntime:cuda: the model has no onnxruntime-cuda variant (export --engine onnx-cuda)"
    assert passed_over == ((export,) if problem is None else ())
    _, passed_over = choose("cuda", parse_device("cuda", fallback=True), {"onnxruntime-edge"})
    assert passed_over == ((export,) if problem is None else ("onnxruntime:cuda: no driver",))
