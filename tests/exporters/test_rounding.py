"""Rounding by inputs that were seen, against plain twins: nearest, with compensation, after scaling."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from exporters.compression.calibrated import round_along
from exporters.compression.grids import fit
from exporters.compression.numpy_network import Array, NumpyNetwork, logits
from exporters.compression.rounding import DAMPING, Inputs, compensated, error_of, nearest
from exporters.compression.scaling import ScaledCheckpoint, best_scale, find_scales
from exporters.compression.tensor_folder import ReplacedCheckpoint, TensorFolder
from exporters.network import build, tensor_names
from exporters.safetensors_checkpoint import SafetensorsCheckpoint
from exporters.weights import Tensor, dequantize
from tests.exporters.numpy_builder import run
from tests.exporters.random_checkpoint import MATRICES, SHORT, RandomCheckpoint
from tests.exporters.test_families import FOLDER, MODELS

RANDOM = np.random.default_rng(11)


class _Logits(NumpyNetwork):
    def output(self, x: Array, table: Tensor, scale: float, softcap: float | None) -> None:
        self.logits = logits(x, table, scale, softcap)


# --- running in numpy -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_the_network_in_float32_is_that_in_float64(name: str) -> None:
    checkpoint = SafetensorsCheckpoint(FOLDER / name)
    ids = np.load(FOLDER / name / "reference.npz")["ids"].astype(np.int64)
    windows = np.stack([ids[:24], ids[8:32]])
    network = _Logits(windows, checkpoint.architecture.rope_switch)
    build(checkpoint, network)
    expected = np.concatenate([run(checkpoint, window) for window in windows])
    np.testing.assert_allclose(network.logits, expected, rtol=0, atol=2e-4)


# --- rounding ---------------------------------------------------------------------------------------------------------


def inputs_that_go_together(columns: int, count: int = 400) -> Array:
    mixing = RANDOM.standard_normal((columns, columns)) * 0.3 + np.eye(columns)
    return (RANDOM.standard_normal((count, columns)) @ mixing).astype(np.float32)


@pytest.mark.parametrize(("bits", "symmetric"), [(4, False), (4, True), (8, True)])
def test_a_grid_has_zero_and_what_lies_between_its_ends(bits: int, symmetric: bool) -> None:
    values = RANDOM.standard_normal((50, 32)).astype(np.float32) * np.float32(3)
    values[0], values[1], values[2] = 0, np.abs(values[1]) + 1, -np.abs(values[2]) - 1
    grid = fit(values, bits, symmetric)
    rounded = grid.nearest(values)
    assert (grid.nearest(np.zeros_like(values)) == 0).all()
    assert (grid.scale.astype(np.float16).astype(np.float32) == grid.scale).all()
    assert (grid.zero == np.rint(grid.zero)).all()
    steps = np.abs(grid.scale) * (1.01 if symmetric else 0.51)  # around the middle one end has a code less
    assert (np.abs(rounded - values) <= steps * (1 + 2e-3) + 1e-6).all()
    codes = grid.codes(values)
    assert codes.min() >= 0
    assert codes.max() <= 2**bits - 1


def test_ranges_are_chosen_by_what_errors_cost() -> None:
    values = RANDOM.standard_normal((20, 64)).astype(np.float32)
    values[:, 0] = 6  # far out
    cheap = np.ones(64, np.float32)
    cheap[0] = 1e-6
    plain, chosen = fit(values, 4, False), fit(values, 4, False, cheap)
    cost = [((grid.nearest(values) - values) ** 2 * cheap).sum() for grid in (plain, chosen)]
    assert cost[1] < 0.9 * cost[0]


def plain_gptq(weight: Array, gram: Array, group: int) -> NDArray[np.float64]:
    """By the definition (OBQ with a fixed order): after each column the others are set to what is best, given it."""
    columns = len(gram)
    hessian = gram.astype(np.float64) + DAMPING * np.diag(gram).mean() * np.eye(columns)
    left = weight.astype(np.float64)
    rounded = np.empty_like(left)
    for column in range(columns):
        inverse = np.linalg.inv(hessian[column:, column:])
        if column % group == 0:
            part = slice(column, column + group)
            costs = [1 / np.linalg.inv(hessian[each:, each:])[0, 0] for each in range(column, column + group)]
            grid = fit(left[:, part].astype(np.float32), 4, False, np.array(costs, np.float32))
        rounded[:, column] = grid.nearest(left[:, column : column + 1].astype(np.float32))[:, 0]
        error = (left[:, column] - rounded[:, column]) / inverse[0, 0]
        left[:, column:] -= error[:, None] * inverse[0]
    return rounded


def test_errors_are_made_good_as_the_definition_says() -> None:
    x = inputs_that_go_together(64)
    weight = RANDOM.standard_normal((24, 64)).astype(np.float32)
    inputs = Inputs(x)
    made = compensated(weight, inputs, 4, 16).dequantize()
    expected = plain_gptq(weight, inputs.gram, 16)
    assert np.isclose(made, expected, atol=1e-4).mean() > 0.97  # a value in the middle may fall to either side
    assert error_of(made, weight, inputs.gram) == pytest.approx(error_of(expected, weight, inputs.gram), rel=0.02)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("columns", "group"), [(64, 32), (320, 64), (256, 128), (48, 16)])
def test_the_product_suffers_less(columns: int, group: int, symmetric: bool) -> None:
    x = inputs_that_go_together(columns)
    weight = RANDOM.standard_normal((40, columns)).astype(np.float32)
    inputs = Inputs(x)
    plain, made = nearest(weight, 4, group, symmetric), compensated(weight, inputs, 4, group, symmetric)
    assert made.group == plain.group == group
    assert not symmetric or (made.zero == 8).all()
    errors = [float((((each.dequantize() - weight) @ x.T) ** 2).sum()) for each in (plain, made)]
    assert errors[1] < 0.6 * errors[0]
    assert error_of(made.dequantize(), weight, inputs.gram) * len(x) == pytest.approx(errors[1], rel=1e-3)


def test_inputs_that_say_nothing() -> None:
    weight = RANDOM.standard_normal((8, 32)).astype(np.float32)
    silent = compensated(weight, Inputs(np.zeros((5, 32), np.float32)), 4, 32).dequantize()
    assert np.isfinite(silent).all()
    assert np.abs(silent - weight).max() < 1
    few = compensated(weight, Inputs(RANDOM.standard_normal((2, 32)).astype(np.float32)), 4, 32).dequantize()
    assert np.isfinite(few).all()


def test_what_comes_later_sees_what_was_rounded_before(tmp_path: Path) -> None:
    checkpoint = RandomCheckpoint(SHORT)
    seen: dict[str, Array] = {}

    def round_(name: str, tensor: Tensor, inputs: Inputs) -> Tensor:
        seen[name] = inputs.gram
        return nearest(dequantize(tensor), 4, 32) if tensor.shape[1] % 32 == 0 else tensor

    ids = RANDOM.integers(0, 160, (3, 20))
    folder = TensorFolder(tmp_path)
    round_along(checkpoint, ids, round_, folder)
    made = ReplacedCheckpoint(checkpoint, folder)
    again: dict[str, Array] = {}

    def look(name: str, tensor: Tensor, inputs: Inputs) -> Tensor:
        again[name] = inputs.gram
        return tensor

    second = tmp_path / "second"
    second.mkdir()
    round_along(made, ids, look, TensorFolder(second))
    matrices = {name for name in tensor_names(SHORT) if name.rpartition(".")[2] in MATRICES}
    assert set(seen) == matrices
    for name in matrices - {"head"}:
        np.testing.assert_allclose(seen[name], again[name], rtol=1e-4, atol=1e-5)


# --- scaling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_scaling_is_exact(name: str) -> None:
    checkpoint = SafetensorsCheckpoint(FOLDER / name)
    ids = np.load(FOLDER / name / "reference.npz")["ids"].astype(np.int64)[:30]
    scales = find_scales(checkpoint, ids[None], 16, False)
    assert any((scale != 1).any() for scale in scales.values())
    scaled = ScaledCheckpoint(checkpoint, scales)
    np.testing.assert_allclose(run(scaled, ids), run(checkpoint, ids), rtol=0, atol=2e-3)


def test_inputs_that_matter_lose_less() -> None:
    x = RANDOM.standard_normal((300, 64)).astype(np.float32)
    x[:, ::16] *= 30
    weight = RANDOM.standard_normal((40, 64)).astype(np.float32)
    gram = Inputs(x).gram
    scale = best_scale(weight, gram, np.abs(x).mean(0), 32, False)
    scaled = nearest(weight * scale, 4, 32).dequantize() / scale
    assert error_of(scaled, weight, gram) < 0.5 * error_of(nearest(weight, 4, 32).dequantize(), weight, gram)
