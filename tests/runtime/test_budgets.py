"""What a budget leaves for the KV cache, and what a refusal says."""

from __future__ import annotations

from pathlib import Path

import pytest

from devices.discovery import Device, Facts
from devices.host import Memory
from edge_runtime.budgets import DEFAULT_SHARE, put_aside, share_out
from edge_runtime.errors import BudgetError, ConfigError
from edge_runtime.exporting import export_package
from edge_runtime.footprint import Model, Use, footprint, least_budget
from edge_runtime.memory import BudgetSize, format_bytes
from edge_runtime.package import Package, Variant
from edge_runtime.paths import Home
from edge_runtime.placement import Wish, place
from edge_runtime.store import Store

CPU = Device("openvino:cpu", "openvino", "a processor")
CONTEXT, STREAMS = 1024, 16
GIB = 1 << 30


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    folder = tmp_path_factory.mktemp("made") / "tiny"
    return export_package("synthetic:tiny", folder, ["openvino", "onnxruntime-edge"], "int4")


@pytest.fixture(autouse=True)
def small_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests run in a process that has more in memory than the models do."""
    monkeypatch.setattr("edge_runtime.budgets._resident", lambda device: 0)


def have(monkeypatch: pytest.MonkeyPatch, free: int | None) -> None:
    """A machine of 64 GiB with so much free; None: a device that does not tell."""
    memory = None if free is None else Memory(64 * GIB, free)
    monkeypatch.setattr("edge_runtime.budgets.facts", lambda device: Facts(memory))


def openvino(package: Package) -> tuple[Variant, Model]:
    variant = package.variant("openvino")
    assert variant is not None
    return variant, Model.of(package, variant)


def test_a_budget_is_used_to_the_full(package: Package) -> None:
    variant, model = openvino(package)
    peak = footprint(model, Use(3 * CONTEXT, STREAMS)).budget
    tokens, _ = share_out(BudgetSize(peak), CPU, package, variant)
    assert tokens is not None
    assert 3 * CONTEXT <= tokens < 3 * CONTEXT + 64
    assert share_out(BudgetSize(GIB), CPU, package, variant) == (STREAMS * CONTEXT, 0)
    assert share_out(BudgetSize(GIB), CPU, package, variant, max_sequences=2) == (2 * CONTEXT, 0)


def test_a_percentage_is_of_all_memory(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    variant, _ = openvino(package)
    have(monkeypatch, 0)
    assert share_out(BudgetSize(0, 50), CPU, package, variant) == (STREAMS * CONTEXT, 0)
    have(monkeypatch, None)
    with pytest.raises(ConfigError, match="50% of what"):
        share_out(BudgetSize(0, 50), CPU, package, variant)


def test_the_prefix_store_goes_first(package: Package) -> None:
    variant, model = openvino(package)
    tight = least_budget(model, Use(CONTEXT, STREAMS))
    with_store = footprint(model, Use(256, STREAMS, prefix_store=True)).budget
    assert share_out(BudgetSize(with_store), CPU, package, variant, store_bytes=GIB)[1] == GIB
    assert share_out(BudgetSize(tight), CPU, package, variant, store_bytes=GIB) == (256, 0)


def test_what_is_in_memory_already_counts(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    variant, model = openvino(package)
    budget = BudgetSize(least_budget(model, Use(CONTEXT, STREAMS)) + (1 << 20))
    share_out(budget, CPU, package, variant)
    monkeypatch.setattr("edge_runtime.budgets._resident", lambda device: GIB)
    with pytest.raises(BudgetError, match=r"needs 1\.\d+ GiB at least \(base 1\.00 GiB"):
        share_out(budget, CPU, package, variant)


def test_a_refusal_names_the_whole_least_budget_and_what_else_would_do(package: Package) -> None:
    variant, model = openvino(package)
    edge = package.variant("onnxruntime-edge")
    assert edge is not None
    least = least_budget(model, Use(CONTEXT, STREAMS))
    smaller = least_budget(Model.of(package, edge), Use(CONTEXT, STREAMS))
    assert smaller < least
    with pytest.raises(BudgetError) as refused:
        share_out(BudgetSize(smaller), CPU, package, variant)
    said = str(refused.value)
    assert f"openvino-int4 needs {format_bytes(least)} at least (base " in said
    assert f"more than the budget of {format_bytes(smaller)}" in said
    assert f"the variant onnx-edge-int4, with {format_bytes(smaller)}" in said
    wide = least_budget(model, Use(CONTEXT, STREAMS, kv_type="float32"))
    with pytest.raises(BudgetError, match=r"--kv-type int8, with .*; --kv-type float16, with"):
        share_out(BudgetSize(wide - 1), CPU, package, variant, kv_type="float32")


def test_without_a_budget_a_share_of_what_is_free_is_the_limit(
    package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant, model = openvino(package)
    have(monkeypatch, 8 * GIB)
    assert share_out(None, CPU, package, variant, store_bytes=5) == (None, 5)
    have(monkeypatch, None)
    assert share_out(None, CPU, package, variant, store_bytes=5) == (None, 5)
    least, whole = least_budget(model, Use(CONTEXT)), footprint(model, Use(CONTEXT)).budget
    have(monkeypatch, int((least + whole) / 2 / DEFAULT_SHARE))
    tokens, store = share_out(None, CPU, package, variant, store_bytes=5)
    assert tokens is not None
    assert 256 <= tokens < CONTEXT
    assert store == 0
    have(monkeypatch, int(least / DEFAULT_SHARE) - 100)
    with pytest.raises(BudgetError, match=r"80% of the memory that is free; .* a --memory-budget of your own"):
        share_out(None, CPU, package, variant)


def test_devices_without_room_are_put_aside(package: Package, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("devices.edge_kernels.instructions", lambda: "avx2")
    _, model = openvino(package)
    budget = BudgetSize(least_budget(model, Use(CONTEXT)) - 1)
    names = ("openvino:cpu", "edge:cpu", "onnxruntime:cpu", "openvino:npu")
    aside = put_aside(package, names, None, budget, None)
    assert list(aside) == ["openvino:cpu"]
    assert "openvino-int4 needs" in aside["openvino:cpu"]
    with pytest.raises(BudgetError, match=r"no variant of tiny fits: openvino:cpu: openvino-int4 needs .* MiB, more"):
        put_aside(package, ["openvino:cpu"], None, budget, None)

    store = Store(Home(tmp_path / "home", tmp_path / "home" / "cache"))
    ref = str(package.folder)
    monkeypatch.setattr("devices.names.ALIASES", {"auto": ("openvino:cpu", "edge:cpu")})
    placed = place(store, Wish(ref), unfit=lambda package, names: put_aside(package, names, None, budget, None))
    assert placed.device.name == "edge:cpu"
    assert placed.reason.startswith("the best that can be used; not openvino:cpu: openvino-int4 needs")
    assert place(store, Wish(ref)).device.name == "openvino:cpu"
