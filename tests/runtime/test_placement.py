"""Which device gets a model, by what is here and what can be had."""

from __future__ import annotations

from pathlib import Path

import pytest

from devices.errors import DeviceUnavailable, UnknownDevice
from edge_runtime.errors import ModelNotFound
from edge_runtime.exporting import export_package
from edge_runtime.fetch import Fetched
from edge_runtime.machine import fingerprint
from edge_runtime.measurements import Measurement, Measurements, Shape, Workload
from edge_runtime.paths import Home
from edge_runtime.placement import Wish, place
from edge_runtime.store import Store


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """On a machine where our own kernels are the best."""
    monkeypatch.setattr("devices.edge_kernels.instructions", lambda: "avx2")
    return Store(Home(tmp_path / "home", tmp_path / "home" / "cache"))


def test_a_new_model_is_made_for_the_best_device(store: Store) -> None:
    device, package, variant, *_ = place(store, Wish("synthetic:tiny", "auto"))
    assert (device.name, variant.name) == ("edge:cpu", "onnx-edge-int4")
    assert variant.engine == package.spec(variant).engine == "onnxruntime-edge"
    assert place(store, Wish("synthetic:tiny", "auto", "int4"))[:3] == (device, package, variant)


def test_what_is_here_already_is_taken(store: Store) -> None:
    store.ensure("synthetic:tiny", "openvino", "int4")
    device, _, variant, *_ = place(store, Wish("synthetic:tiny", "cpu"))
    assert (device.name, variant.name) == ("openvino:cpu", "openvino-int4")
    device, _, variant, *_ = place(store, Wish("synthetic:tiny", "cpu", "int8"))
    assert (device.name, variant.name) == ("edge:cpu", "onnx-edge-int8")


def test_unless_the_best_is_asked_for(store: Store) -> None:
    store.ensure("synthetic:tiny", "onnxruntime")
    device, package, variant, *_ = place(store, Wish("synthetic:tiny", "auto"), best=True)
    assert (device.name, variant.name) == ("edge:cpu", "onnx-edge-int4")
    assert [each.name for each in package.manifest.variants] == ["onnx-int4", "onnx-edge-int4"]


def test_a_package_by_path_stays_as_it_is(store: Store, tmp_path: Path) -> None:
    export_package("synthetic:tiny", tmp_path / "made", ["onnxruntime"], "int4")
    for best in (False, True):
        device, package, variant, *_ = place(store, Wish(str(tmp_path / "made"), "auto"), best=best)
        assert (device.name, variant.name) == ("onnxruntime:cpu", "onnx-int4")
        assert package.folder == tmp_path / "made"
    with pytest.raises(DeviceUnavailable, match=r"no onnxruntime-edge variant \(export --engine onnx-edge\)"):
        place(store, Wish(str(tmp_path / "made"), "edge:cpu"))


def test_a_package_from_the_hub_has_what_it_has(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = export_package("synthetic:tiny", tmp_path / "made", ["openvino"], "int4")
    monkeypatch.setattr("edge_runtime.exporting.fetch_hub", lambda *_: Fetched(made.folder, {"source": "hf:org/tiny"}))
    for best in (True, False):
        device, package, variant, *_ = place(store, Wish("hf:org/tiny", "auto"), best=best)
        assert (device.name, variant.name) == ("openvino:cpu", "openvino-int4")
        assert package.folder.parent == store.home.models
    with pytest.raises(ModelNotFound, match="no onnxruntime variant; it has: openvino-int4"):
        place(store, Wish("hf:org/other", "onnxruntime:cpu"))


def test_names_are_checked_first(store: Store) -> None:
    with pytest.raises(UnknownDevice):
        place(store, Wish("hf:org/none", "tpu"))
    assert not store.home.models.exists()


def test_measurements_decide_among_what_is_here(store: Store) -> None:
    for engine in ("onnxruntime", "openvino", "onnxruntime-edge"):
        package, _ = store.ensure("synthetic:tiny", engine, "int4")
    kept = Measurements(store.home.measurements, fingerprint())
    for device, seconds in (("edge:cpu", 3), ("onnxruntime:cpu", 2), ("openvino:cpu", 1)):
        kept.keep(Measurement(package.name, device, "int4", Shape(512, 64, 8), seconds, fingerprint()))
    assert place(store, Wish("synthetic:tiny", "auto"))[0].name == "edge:cpu"
    assert place(store, Wish("synthetic:tiny", "cpu", workload="many"))[0].name == "openvino:cpu"
    assert place(store, Wish("synthetic:tiny", "edge:cpu", workload="many"))[0].name == "edge:cpu"
    assert place(store, Wish("synthetic:tiny", "auto", workload="many"), best=True)[0].name == "edge:cpu"


def test_every_choice_has_its_reason(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(device: str = "auto", workload: Workload = "one") -> str:
        return place(store, Wish("synthetic:tiny", device, "int4", workload=workload)).reason

    assert reason() == "the first choice for auto"
    assert reason("onnxruntime:cpu") == "it was asked for"
    store.ensure("synthetic:tiny", "openvino", "int4")
    kept = Measurements(store.home.measurements, fingerprint())
    name = place(store, Wish("synthetic:tiny", "auto")).package.name
    for device, seconds in (("edge:cpu", 3), ("onnxruntime:cpu", 2)):
        kept.keep(Measurement(name, device, "int4", Shape(512, 64, 8), seconds, fingerprint()))
    assert reason(workload="many") == "the fastest here of 2 measured with many streams"
    assert reason() == "the first choice for auto"

    def gone() -> str:
        raise DeviceUnavailable("the kernels are not built; install a compiler")

    monkeypatch.setattr("devices.edge_kernels.instructions", gone)
    assert reason("CPU") == "the best that can be used; not edge:cpu: the kernels are not built; install a compiler"
