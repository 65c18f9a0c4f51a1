"""The real SmolLM2 takes the memory that was predicted, keeps within its budget and gives it back: in new processes."""

from __future__ import annotations

import sys

import pytest

from edge_runtime.footprint import Model, Use, footprint
from edge_runtime.package import Package
from tests.bench.memory import DEVICES, run
from tests.bench.memory_order import Order
from tests.conftest import usable

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")

STREAMS = 16
MIB = 1 << 20


def model(package: Package, device: str) -> Model:
    variant = next(each for each in package.manifest.variants if each.engine == DEVICES[usable(device)])
    return Model.of(package, variant)


@pytest.mark.parametrize("device", DEVICES)
def test_the_peak_is_as_predicted(device: str, smollm2_package: Package) -> None:
    order = Order(str(smollm2_package.folder), device, [300] * STREAMS, new_tokens=8, threads=2)
    predicted = footprint(model(smollm2_package, device), Use(308 * STREAMS, STREAMS)).peak
    answer = run(order)
    print(f"{device}: predicted {predicted / MIB:.0f} MiB, measured {answer.peak / MIB:.0f}")
    assert answer.peak == pytest.approx(predicted, rel=0.05)


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_passes_the_budget_and_unloading_gives_it_back(device: str, smollm2_package: Package) -> None:
    budget = footprint(model(smollm2_package, device), Use(4096, STREAMS)).budget
    prompts = [*[200] * STREAMS, 900]
    order = Order(str(smollm2_package.folder), device, prompts, new_tokens=8, budget=budget, threads=2, rounds=2)
    answer = run(order)
    print(f"{device}: budget {budget / MIB:.0f} MiB, {answer.peak / MIB:.0f} used, {answer.given_back:.1%} given back")
    assert answer.peak <= budget
    assert answer.given_back >= 0.9
