"""Rounding by a text, against plain twins and against what it is to make better."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_runtime.errors import ConfigError
from edge_runtime.evaluation.metrics import Tally
from edge_runtime.recipe import Recipe
from exporters.checkpoint import Checkpoint, TextFiles
from exporters.compression import compress as module
from exporters.compression.budget import bits_of_weight, mean_bits, wide_tensors
from exporters.compression.calibrated import round_along
from exporters.compression.compress import Text, compress
from exporters.compression.grids import fit
from exporters.compression.numpy_network import Array, NumpyNetwork, logits
from exporters.compression.rounding import DAMPING, Inputs, compensated, error_of, nearest
from exporters.compression.scaling import ScaledCheckpoint, best_scale, find_scales
from exporters.compression.sensitivity import sensitivities
from exporters.compression.shrink import Shrinking, shrink
from exporters.compression.tensor_folder import ReplacedCheckpoint, TensorFolder
from exporters.network import build, tensor_names
from exporters.quantize import quantize
from exporters.safetensors_checkpoint import SafetensorsCheckpoint
from exporters.synthetic import SyntheticCheckpoint
from exporters.weights import QuantizedTensor, Tensor, dequantize
from tests.exporters.numpy_builder import run
from tests.exporters.random_checkpoint import ARCHITECTURE, RandomCheckpoint
from tests.exporters.test_families import FOLDER, MODELS

RANDOM = np.random.default_rng(11)
SHORT = replace(ARCHITECTURE, layers=ARCHITECTURE.layers[:2])
MATRICES = ("q", "k", "v", "o", "gate", "up", "down", "head")
TEXT = Text("a text", "The harbour wakes before the town does. Ships leave; gulls follow them out. " * 20)


class Spoken(RandomCheckpoint):
    """With a tokenizer."""

    @property
    def text(self) -> TextFiles:
        return SyntheticCheckpoint("tiny").text


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


# --- which matrices have more bits ------------------------------------------------------------------------------------


def test_sensitivity_is_that_of_one_matrix_rounded_alone(tmp_path: Path) -> None:
    checkpoint = RandomCheckpoint(SHORT)
    ids = RANDOM.integers(0, 160, 25)

    def rounded(name: str, tensor: Tensor) -> Tensor:
        return nearest(dequantize(tensor), 4, 16)

    found = sensitivities(checkpoint, ids, rounded)
    reference = run(checkpoint, ids)
    assert set(found) == {name for name in tensor_names(SHORT) if name.rpartition(".")[2] in MATRICES[:-1]}
    for number, name in enumerate(found):
        place = tmp_path / str(number)
        place.mkdir()
        folder = TensorFolder(place)
        folder[name] = rounded(name, checkpoint.tensor(name))
        tally = Tally()
        alone = run(ReplacedCheckpoint(checkpoint, folder), ids)
        tally.add(alone.astype(np.float32), np.zeros(25, np.int64), reference.astype(np.float32))
        assert found[name] == pytest.approx(tally.figures().kl, rel=0.02, abs=2e-5)


def test_bits_go_where_rounding_moves_most() -> None:
    names = [name for name in tensor_names(SHORT) if name.rpartition(".")[2] in ("o", "down")]
    sensitivity = {name: float(place) for place, name in enumerate(names)}
    recipe = Recipe(bits=5.5, embedding_bits=4)
    wide = wide_tensors(SHORT, recipe, sensitivity)
    assert wide
    assert len(wide) < len(names)
    assert names[-2] in wide  # of a layer's last two the one that is smaller for what it moves
    assert wide_tensors(SHORT, Recipe(bits=9, embedding_bits=4), sensitivity) == set(names)
    with pytest.raises(ConfigError, match=r"more than the 4\.1 wanted"):
        wide_tensors(SHORT, Recipe(bits=4.1), sensitivity)


@pytest.mark.parametrize("bits", [4.63, 5.0, 5.6])
def test_the_size_is_kept(bits: float, tmp_path: Path) -> None:
    recipe = Recipe(method="nearest", group=32, embedding_bits=4, bits=bits)
    made, compression = compress(Spoken(replace(SHORT, vocab_size=512)), recipe, TEXT, tmp_path)
    assert compression.bits == pytest.approx(mean_bits(made))
    assert bits_of_weight(4, recipe) <= compression.bits <= bits + 1e-6
    assert bool(compression.wide) == (bits > 4.63)


# --- recipes ----------------------------------------------------------------------------------------------------------


def matrices(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    for name in tensor_names(checkpoint.architecture):
        tensor = checkpoint.tensor(name)
        if len(tensor.shape) == 2:
            yield name, tensor


@pytest.mark.parametrize("method", ["nearest", "gptq", "awq", "awq+gptq"])
def test_every_method_gives_what_was_asked(method: str, tmp_path: Path) -> None:
    source = Spoken(replace(SHORT, vocab_size=512, tied_head=method == "gptq"))
    recipe = Recipe(method=method, group=64, symmetric=True, embedding_bits=4)  # type: ignore[arg-type]
    made, compression = compress(source, recipe, TEXT if recipe.calibrated else None, tmp_path)
    for _, tensor in matrices(made):
        assert isinstance(tensor, QuantizedTensor)
        assert (tensor.bits, tensor.group) == (4, 64)
        assert (tensor.zero == 8).all()
    assert (compression.calibration is not None) == (method != "nearest")
    assert compression.bits == 4.25


def test_blocks_of_a_source_are_carried_over(tmp_path: Path) -> None:
    source = Spoken(
        replace(SHORT, vocab_size=512), lambda name, values: quantize(values, 8 if name == "embed" else 4, 32)
    )
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    same, _ = compress(source, Recipe(method="gptq"), TEXT, tmp_path / "a")
    other, _ = compress(source, Recipe(method="gptq", group=64), TEXT, tmp_path / "b")
    for (name, ours), (_, theirs), (_, anew) in zip(matrices(same), matrices(source), matrices(other), strict=True):
        assert isinstance(ours, QuantizedTensor)
        assert isinstance(theirs, QuantizedTensor)
        assert isinstance(anew, QuantizedTensor)
        if name != "head":  # 4 bits there; embedding and head have 8 in this recipe
            np.testing.assert_array_equal(ours.codes, theirs.codes)
        assert anew.group == (32 if name in ("embed", "head") else 64)


def test_what_it_has_cost_is_measured(tmp_path: Path) -> None:
    source = Spoken(replace(SHORT, vocab_size=512))
    shrinking = Shrinking(Recipe(group=64), None, [TEXT, Text("b", "Another one.")], Tally)
    made, compression = shrink(source, shrinking, "int4", tmp_path)
    ids = module.encode(source, TEXT)[:512]
    more = module.encode(source, Text("b", "Another one."))
    tally = Tally()
    for each in (ids, more):
        ours, theirs = (run(model, each)[:-1].astype(np.float32) for model in (made, source))
        tally.add(ours, each[1:], theirs)
    figures = tally.figures()
    assert compression.evaluated == figures.tokens
    assert figures.kl is not None
    assert compression.quality["kl"] == pytest.approx(figures.kl, rel=1e-3)
    assert compression.quality["top1"] == pytest.approx(figures.top1, abs=0.005)
    assert compression.quality["perplexity"] == pytest.approx(figures.perplexity, rel=1e-3)


@pytest.mark.parametrize(
    ("recipe", "text", "words"),
    [
        (Recipe(method="gptq"), Text("short", "Too short."), "short has 10 tokens"),
        (Recipe(method="awq"), Text("empty", ""), "empty has 0 tokens"),
        (Recipe(bits=4.3), TEXT, r"more than the 4\.3 wanted"),
    ],
)
def test_what_cannot_be_done_is_said(recipe: Recipe, text: Text, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        compress(Spoken(replace(SHORT, vocab_size=512)), recipe, text, tmp_path)


@pytest.mark.parametrize("given", [{"group": 48}, {"group": 256}, {"embedding_bits": 3}, {"bits": 4.0}, {"bits": 12.0}])
def test_recipes_that_cannot_be(given: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        Recipe(**given)  # type: ignore[arg-type]
