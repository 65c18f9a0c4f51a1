"""What was measured here decides, and only where it speaks for the same work."""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec
import pytest

from edge_runtime.errors import StorageError
from edge_runtime.measurements import Measurement, Measurements, Shape

HERE = "a processor, 2 cores"
ALL = ("edge:cpu", "onnxruntime:cpu", "openvino:cpu")
ONE, MANY, LONG = Shape(512, 64, 1), Shape(512, 64, 8), Shape(2048, 32, 1)


def measured(device: str, seconds: float, shape: Shape = ONE, **other: str) -> Measurement:
    values = {"model": "m", "weights": "int4", "machine": HERE, **other}
    return Measurement(device=device, shape=shape, seconds=seconds, **values)


@pytest.fixture
def kept(tmp_path: Path) -> Measurements:
    return Measurements(tmp_path / "cache" / "measurements.json", HERE)


def keep(kept: Measurements, *measurements: Measurement) -> None:
    for each in measurements:
        kept.keep(each)


def test_workloads() -> None:
    assert [shape.workload for shape in (ONE, MANY, LONG, Shape(2048, 32, 2))] == ["one", "many", "long", "many"]


def test_nothing_measured_changes_nothing(kept: Measurements) -> None:
    assert kept.order(ALL, "m", "int4", "one") == list(ALL)


def test_the_fastest_of_a_workload_is_first(kept: Measurements) -> None:
    keep(kept, measured("edge:cpu", 2), measured("onnxruntime:cpu", 3), measured("openvino:cpu", 1))
    keep(kept, measured("edge:cpu", 2, MANY), measured("onnxruntime:cpu", 1, MANY), measured("openvino:cpu", 3, MANY))
    assert kept.order(ALL, "m", "int4", "one") == ["openvino:cpu", "edge:cpu", "onnxruntime:cpu"]
    assert kept.order(ALL, "m", None, "many") == ["onnxruntime:cpu", "edge:cpu", "openvino:cpu"]
    assert kept.order(ALL, "m", "int4", "long") == list(ALL)


def test_what_was_not_measured_keeps_its_place(kept: Measurements) -> None:
    keep(kept, measured("openvino:cpu", 1), measured("onnxruntime:cpu", 2), measured("openvino:gpu", 0.1))
    assert kept.order(ALL, "m", "int4", "one") == ["edge:cpu", "openvino:cpu", "onnxruntime:cpu"]


def test_shapes_are_not_mixed(kept: Measurements) -> None:
    """A short request takes less time on any device."""
    keep(kept, measured("edge:cpu", 2), measured("openvino:cpu", 1, Shape(64, 64, 1)), measured("onnxruntime:cpu", 1))
    assert kept.order(ALL, "m", "int4", "one")[0] == "onnxruntime:cpu"


@pytest.mark.parametrize("other", [{"model": "another"}, {"weights": "int8"}, {"machine": "another processor"}])
def test_others_do_not_count(kept: Measurements, other: dict[str, str]) -> None:
    keep(kept, measured("edge:cpu", 2), measured("onnxruntime:cpu", 1, **other))
    assert kept.order(ALL, "m", "int4", "one")[0] == "edge:cpu"


def test_the_latest_replaces_the_earlier(kept: Measurements) -> None:
    keep(kept, measured("edge:cpu", 2), measured("onnxruntime:cpu", 1), measured("onnxruntime:cpu", 3))
    assert [each.seconds for each in kept.read()] == [2, 3]
    assert kept.order(ALL, "m", "int4", "one")[0] == "edge:cpu"


def test_those_of_other_machines_stay(kept: Measurements, tmp_path: Path) -> None:
    """And of other versions: who goes back to them has them still."""
    there = Measurements(tmp_path / "cache" / "measurements.json", "another processor")
    keep(kept, measured("edge:cpu", 2))
    keep(
        there,
        measured("edge:cpu", 1, machine="another processor"),
        measured("edge:cpu", 3, machine="another processor"),
    )
    keep(kept, measured("edge:cpu", 4))
    assert [each.seconds for each in kept.read()] == [4]
    assert [each.seconds for each in there.read()] == [3]


def test_a_file_that_cannot_be_written_is_an_error(kept: Measurements, tmp_path: Path) -> None:
    (tmp_path / "cache" / "measurements.new").mkdir(parents=True)
    with pytest.raises(StorageError, match=r"cannot write .*measurements\.json"):
        keep(kept, measured("edge:cpu", 2))


@pytest.mark.parametrize("broken", [b"", b"{", b'[{"model": 1}]', b"\xff\xfe", b"null"])
def test_a_broken_file_is_nothing_measured(
    kept: Measurements, tmp_path: Path, broken: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "cache" / "measurements.json"
    file.parent.mkdir()
    file.write_bytes(broken)
    with caplog.at_level(logging.WARNING):
        assert kept.order(ALL, "m", "int4", "one") == list(ALL)
    assert "bench again to replace it" in caplog.text
    keep(kept, measured("edge:cpu", 2))
    assert len(msgspec.json.decode(file.read_bytes())) == 1
    assert file.with_suffix(".broken.json").read_bytes() == broken


def test_times_that_are_none(kept: Measurements) -> None:
    keep(kept, measured("edge:cpu", 2), measured("onnxruntime:cpu", 0.0), measured("openvino:cpu", -1))
    assert kept.order(ALL, "m", "int4", "one") == list(ALL)


def test_losses_by_weights(kept: Measurements) -> None:
    """The latest that was scored; a run that scores nothing does not lose it."""
    keep(kept, measured("edge:cpu", 2), measured("edge:cpu", 2, model="another"))
    assert kept.losses("m") == {}
    fp32 = msgspec.structs.replace(measured("onnxruntime:cpu", 3, weights="fp32"), loss=2.0)
    int4 = msgspec.structs.replace(measured("edge:cpu", 1), loss=2.5)
    keep(kept, fp32, int4, measured("edge:cpu", 3))
    assert kept.losses("m") == {"fp32": 2.0, "int4": 2.5}
    keep(kept, msgspec.structs.replace(measured("openvino:cpu", 1), loss=2.25))
    assert kept.losses("m") == {"fp32": 2.0, "int4": 2.25}
    assert {each.device: each.seconds for each in kept.read() if each.weights == "int4" and each.model == "m"} == {
        "edge:cpu": 3,
        "openvino:cpu": 1,
    }
