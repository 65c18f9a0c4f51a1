"""Every hint is one that its engine takes, and none changes what is computed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from devices import hints as hints_module
from devices.base import DecoderOptions, DecoderSpec, Step
from devices.errors import EngineError
from devices.hints import hints, pinning, pinning_choices
from devices.host import core_groups
from devices.registry import open_decoder
from tests.conftest import usable
from tests.devices.conftest import _spec

TOKENS = np.arange(1, 60)


@pytest.fixture(scope="module", params=["edge:cpu", "onnxruntime:cpu", "openvino:cpu"])
def device(request: pytest.FixtureRequest) -> str:
    return usable(request.param)


@pytest.fixture(scope="module")
def spec(device: str, tmp_path_factory: pytest.TempPathFactory) -> DecoderSpec:
    return _spec(device, tmp_path_factory.mktemp("spec"))


def logits(
    device: str, spec: DecoderSpec, threads: int | None = None, properties: Mapping[str, str] | None = None
) -> NDArray[np.float32]:
    options = DecoderOptions(max_sequences=1, threads=threads, properties=dict(properties or {}))
    decoder = open_decoder(spec, device, options)
    try:
        (row,) = decoder.forward([Step(decoder.new_sequence(), TOKENS)])
    finally:
        decoder.close()
    return row


def test_none_changes_an_answer(device: str, spec: DecoderSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hints_module, "cores_differ", lambda: True)
    monkeypatch.setattr(hints_module, "cores", lambda: 8)
    ways = [way for ways in hints(device).values() for way in ways]
    assert ways
    plain = logits(device, spec)
    for way in ways:
        np.testing.assert_allclose(logits(device, spec, properties=way), plain, atol=1e-4, err_msg=str(way))


def test_pinned_or_not(device: str, spec: DecoderSpec) -> None:
    plain = logits(device, spec)
    for pinned in (True, False):
        for threads in (None, 1, 2, 3):
            found = logits(device, spec, *pinning(device, pinned, threads))
            np.testing.assert_allclose(found, plain, atol=1e-4)


def test_affinities_name_processors_of_this_machine() -> None:
    """One for each thread but the first, as ONNX Runtime demands; it refuses other counts."""
    allowed = {processor for group in core_groups() for processor in group}
    if len(core_groups()) < 2:
        assert pinning_choices("edge:cpu") == ()
        return
    assert pinning_choices("edge:cpu") == (True,)
    threads, properties = pinning("edge:cpu", True, 5)
    affinities = properties["session.intra_op_thread_affinities"].split(";")
    assert (threads, len(affinities)) == (5, 4)
    assert pinning("edge:cpu", True, None)[0] == len(core_groups())
    assert {int(each) - 1 for group in affinities for each in group.split(",")} <= allowed


def test_the_engine_knows_every_name(device: str, spec: DecoderSpec) -> None:
    """OpenVINO refuses others; ONNX Runtime ignores them, so its library is asked, and refuses wrong affinities."""
    names = {name for ways in hints(device).values() for way in ways for name in way}
    if device == "openvino:cpu":
        with pytest.raises(EngineError, match="PERFORMANCE_HNT"):
            logits(device, spec, properties={"PERFORMANCE_HNT": "LATENCY"})
        return
    library = next(Path(onnxruntime.__file__).parent.glob("capi/onnxruntime_pybind11_state*")).read_bytes()
    assert [name for name in (*names, "session.intra_op_thread_affinities") if name.encode() not in library] == []
    with pytest.raises(EngineError, match="affinities"):
        logits(device, spec, 4, {"session.intra_op_thread_affinities": "1"})


def test_devices_without_hints() -> None:
    assert hints("onnxruntime:cuda") == {}
    assert pinning_choices("onnxruntime:cuda") == ()
    assert pinning("onnxruntime:cuda", True, 4) == (4, {})
