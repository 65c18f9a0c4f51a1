"""Failover between the devices that are here, one of which is made to fail."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from devices.base import DecoderOptions, DecoderSpec, Step
from devices.errors import DeviceUnavailable, EngineError
from devices.onnxruntime_gqa import OnnxRuntimeDecoder
from edge_runtime.exporting import export_package
from edge_runtime.llm import EdgeLLM
from edge_runtime.paths import Home
from edge_runtime.placement import Wish, place
from edge_runtime.sampling import SamplingParams
from edge_runtime.store import Store
from tests.runtime.helpers import GREEDY
from tests.runtime.machine import Failing


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGE_GLM_HOME", str(tmp_path / "home"))
    return export_package("synthetic:tiny", tmp_path / "tiny", ["onnxruntime", "openvino"], "int4").folder


def failing_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first, by which the engine learns the size of the vocabulary."""
    plain, failing = OnnxRuntimeDecoder.forward, Failing(1)

    def forward(self: OnnxRuntimeDecoder, batch: Sequence[Step]) -> list[NDArray[np.float32]]:
        failing(batch)
        return plain(self, batch)

    monkeypatch.setattr(OnnxRuntimeDecoder, "forward", forward)


def test_a_real_device_that_fails_while_running(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing_forward(monkeypatch)
    with EdgeLLM(str(tiny), "cpu", prefix_store_bytes=0) as llm:
        assert llm.device == "onnxruntime:cpu"
        answer = llm.generate([1, 2, 3, 4], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
        assert len(answer.token_ids) == 8
        assert llm.placement["device"] == "openvino:cpu"
        assert llm.placement["variant"] == "openvino-int4"
        assert "onnxruntime:cpu: it failed (the accelerator fell over)" in llm.reason
        assert llm.ready


def test_a_named_device_fails_without_fallback(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing_forward(monkeypatch)
    with EdgeLLM(str(tiny), "onnxruntime:cpu", prefix_store_bytes=0) as llm:
        with pytest.raises(EngineError, match="fell over"):
            llm.generate([1, 2, 3, 4], GREEDY)
        assert llm.device == "onnxruntime:cpu"
    with EdgeLLM(str(tiny), "onnxruntime:cpu", prefix_store_bytes=0, fallback=True) as llm:
        assert llm.generate([1, 2, 3, 4], GREEDY).token_ids
        assert llm.device == "openvino:cpu"


def test_a_real_device_that_does_not_open(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: OnnxRuntimeDecoder, spec: DecoderSpec, options: DecoderOptions, device: str) -> None:
        raise EngineError("loading failed in ONNX Runtime: out of address space")

    monkeypatch.setattr(OnnxRuntimeDecoder, "__init__", refuse)
    with pytest.raises(EngineError, match="address space"):
        EdgeLLM(str(tiny), "onnxruntime:cpu")
    for device, fallback in (("auto", False), ("onnxruntime:cpu", True)):
        with EdgeLLM(str(tiny), device, prefix_store_bytes=0, fallback=fallback) as llm:
            assert llm.device == "openvino:cpu"
            assert "onnxruntime:cpu: it does not open (loading failed" in llm.reason


def test_fallback_from_a_device_that_is_not_here(tiny: Path) -> None:
    with pytest.raises(DeviceUnavailable, match="openvino finds no NPU here"):
        EdgeLLM(str(tiny), "npu")
    with EdgeLLM(str(tiny), "npu", prefix_store_bytes=0, fallback=True) as llm:
        assert llm.device == "onnxruntime:cpu"
        assert "not openvino:npu: openvino finds no NPU here" in llm.reason


def test_fallback_is_a_wish_for_any_of_auto(tmp_path: Path) -> None:
    wish = Wish("synthetic:tiny", "npu", fallback=True)
    assert wish.names == ("openvino:npu", "onnxruntime:cuda", "edge:cpu", "onnxruntime:cpu", "openvino:cpu")
    assert Wish("synthetic:tiny", "openvino:cpu", fallback=True).names[0] == "openvino:cpu"
    package = export_package("synthetic:tiny", tmp_path / "made", ["openvino"], "int4")
    store = Store(Home(tmp_path, tmp_path / "cache"))
    assert place(store, Wish(str(package.folder), "openvino:cpu", fallback=True)).reason == "it was asked for"
