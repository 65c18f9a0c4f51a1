"""Recipes: which matrices get more bits, and what a whole checkpoint comes to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_runtime.errors import ConfigError
from edge_runtime.evaluation.metrics import Tally
from edge_runtime.recipe import Recipe
from exporters.checkpoint import Checkpoint
from exporters.compression import compress as module
from exporters.compression.budget import Precision, choose_levels, mean_bits, stored_bits
from exporters.compression.compress import LEVELS, Text, compress
from exporters.compression.rounding import nearest
from exporters.compression.sensitivity import sensitivities
from exporters.compression.shrink import Shrinking, Shrunk, shrink
from exporters.compression.tensor_folder import ReplacedCheckpoint, TensorFolder
from exporters.network import tensor_names
from exporters.quantize import quantize
from exporters.weights import QuantizedTensor, Tensor, dequantize, is_half
from tests.exporters.numpy_builder import run
from tests.exporters.random_checkpoint import FRAGILE, MATRICES, SHORT, TEXT, Fragile, RandomCheckpoint, Spoken

RANDOM = np.random.default_rng(11)


# --- which matrices have more bits ------------------------------------------------------------------------------------


def rounded_to(level: int, tensor: Tensor) -> Tensor:
    values = dequantize(tensor)
    return values.astype(np.float16) if level == 16 else nearest(values, level, 16, level == 8)


def alone(checkpoint: Checkpoint, ids: NDArray[np.int64], name: str, tensor: Tensor, folder: Path) -> float:
    """What a matrix does to the output, in float64."""
    folder.mkdir()
    tensors = TensorFolder(folder)
    tensors[name] = tensor
    tally = Tally()
    changed, plain = run(ReplacedCheckpoint(checkpoint, tensors), ids), run(checkpoint, ids)
    tally.add(changed.astype(np.float32), np.zeros(len(ids), np.int64), plain.astype(np.float32))
    loss = tally.figures().kl
    assert loss is not None
    return loss


def test_sensitivity_is_that_of_one_matrix_rounded_alone(tmp_path: Path) -> None:
    checkpoint = RandomCheckpoint(SHORT)
    ids = RANDOM.integers(0, 160, 25)
    found = sensitivities(checkpoint, ids, lambda name, tensor: {level: rounded_to(level, tensor) for level in LEVELS})
    assert set(found) == {name for name in tensor_names(SHORT) if name.rpartition(".")[2] in MATRICES[:-1]}
    for name, options in found.items():
        narrow, wide, half = options
        assert [each.level for each in options] == list(LEVELS)
        assert [each.bits for each in options] == [4 + 20 / 16, 8 + 16 / 16, 16]
        tensor = rounded_to(4, checkpoint.tensor(name))
        measured = alone(checkpoint, ids, name, tensor, tmp_path / name)
        assert narrow.loss == pytest.approx(measured, rel=0.02, abs=2e-5)
        assert 0 <= half.loss < 1e-2 * wide.loss < 1e-3 * narrow.loss


def test_the_loss_of_more_bits_follows_from_the_error_in_the_product(tmp_path: Path) -> None:
    """Of a change to a tenth of what rounding to 4 bits does, which can still be measured."""
    checkpoint = RandomCheckpoint(SHORT)
    ids = RANDOM.integers(0, 160, 200)

    def candidates(name: str, tensor: Tensor) -> dict[int, Tensor]:
        values, rounded = dequantize(tensor), nearest(dequantize(tensor), 4, 16).dequantize()
        noise = np.random.default_rng(1).permutation((rounded - values).reshape(-1)).reshape(values.shape)
        return {4: rounded, 8: values + np.float32(0.1**0.5) * noise}

    found = sensitivities(checkpoint, ids, candidates)
    for name in ("layers.0.v", "layers.0.down", "layers.1.gate"):
        tensor = candidates(name, checkpoint.tensor(name))[8]
        measured = alone(checkpoint, ids, name, tensor, tmp_path / name)
        assert found[name][1].loss == pytest.approx(measured, rel=0.3)


Precisions = dict[str, list[Precision]]


def options_of(count: int, generator: np.random.Generator) -> tuple[dict[str, int], Precisions]:
    sizes = {str(place): int(generator.integers(1, 9)) * 64 for place in range(count)}
    losses = {name: generator.random() * np.array([1, generator.random() * 0.3, 1e-6]) for name in sizes}
    bits = (4.625, 8.5, 16.0)
    return sizes, {
        name: [Precision(level, *each) for level, *each in zip(LEVELS, bits, loss.tolist(), strict=True)]
        for name, loss in losses.items()
    }


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("bits", [4.7, 6.0, 9.0, 15.0])
def test_bits_go_where_rounding_moves_most(bits: float, seed: int) -> None:
    """Nearly as well as the best of all ways, and within the size."""
    sizes, options = options_of(6, np.random.default_rng(seed))
    chosen = choose_levels(Recipe(bits=bits), sizes, options, {})
    total = sum(sizes.values())

    def outcome(levels: Sequence[int]) -> tuple[float, float]:
        each = [
            next(option for option in options[name] if option.level == level)
            for name, level in zip(sizes, levels, strict=True)
        ]
        spent = sum(size * option.bits for size, option in zip(sizes.values(), each, strict=True))
        return spent / total, sum(option.loss for option in each)

    spent, loss = outcome([chosen.get(name, 4) for name in sizes])
    assert spent <= bits + 1e-9
    ways = [outcome(levels) for levels in product(LEVELS, repeat=len(sizes))]
    best = min(lost for used, lost in ways if used <= bits)
    worst = outcome([4] * len(sizes))[1]
    assert worst - loss >= 0.8 * (worst - best)


def test_what_has_options_is_counted_with_what_has_none() -> None:
    options = {name: [Precision(4, 4.5, loss), Precision(8, 8.5, 0.0)] for name, loss in (("a", 1.0), ("b", 0.0))}
    sizes = {"a": 100, "b": 100, "embed": 200}
    assert choose_levels(Recipe(bits=9.0), sizes, options, {"embed": 8.5}) == {"a": 8}  # b gains nothing
    assert choose_levels(Recipe(bits=7.5), sizes, options, {"embed": 8.5}) == {"a": 8}
    assert choose_levels(Recipe(bits=7.4), sizes, options, {"embed": 8.5}) == {}
    with pytest.raises(ConfigError, match=r"has 6\.50 bits, more than the 6\.4 wanted"):
        choose_levels(Recipe(bits=6.4), sizes, options, {"embed": 8.5})


@pytest.mark.parametrize("bits", [4.63, 5.0, 5.6, 8.0])
def test_the_size_is_kept(bits: float, tmp_path: Path) -> None:
    recipe = Recipe(method="nearest", group=32, embedding_bits=4, bits=bits)
    made, compression = compress(Spoken(replace(SHORT, vocab_size=512)), recipe, TEXT, tmp_path)
    assert compression.bits == pytest.approx(mean_bits(made))
    assert 4 + 20 / 32 <= compression.bits <= bits + 1e-6
    assert bool(compression.wide) == (bits > 4.63)
    assert bool(compression.half) == (bits == 8)
    for name, tensor in matrices(made):
        assert is_half(tensor) == (name in compression.half)
        assert (isinstance(tensor, QuantizedTensor) and tensor.bits == 8) == (name in compression.wide)


@pytest.mark.parametrize("method", ["nearest", "gptq"])
def test_the_size_is_kept_where_a_source_has_the_head_in_more_bits_than_the_embedding(
    method: str, tmp_path: Path
) -> None:
    """As llama.cpp's Q4_K_M has them: a head that comes in 8 bits and is to have 8 stays as it is, and so does the
    embedding in 4."""
    blocks = {"embed": 4, "head": 8}

    def rounded(name: str, values: NDArray[np.float32]) -> Tensor:
        return quantize(values, blocks[name], 32 if name == "embed" else 16) if name in blocks else values

    source = Spoken(replace(SHORT, vocab_size=512), rounded)
    recipe = Recipe(method=method, group=32, embedding_bits=8, bits=6.5)  # type: ignore[arg-type]
    made, compression = compress(source, recipe, TEXT, tmp_path)
    assert [stored_bits(made.tensor(name)) for name in blocks] == [4.625, 9.0]
    assert compression.bits == pytest.approx(mean_bits(made))
    assert 6 < compression.bits <= 6.5
    with pytest.raises(ConfigError, match=r"more than the 5\.5 wanted"):
        compress(source, Recipe(method=method, group=32, embedding_bits=8, bits=5.5), TEXT, tmp_path)


def test_what_was_rounded_for_one_engine_leaves_the_disk_for_the_next(tmp_path: Path) -> None:
    recipe = Recipe(method="nearest", group=32, embedding_bits=4, bits=8.0)
    shrunk = Shrunk(Spoken(replace(SHORT, vocab_size=512)), Shrinking(recipe, TEXT), "int4", tmp_path)
    for levels in ((4, 8), (4, 8, 16)):
        made, compression = shrunk.rounded(levels)
        assert mean_bits(made) == pytest.approx(compression.bits)
        assert len(list(tmp_path.iterdir())) == 1


def test_what_suffers_most_stays_in_float16(tmp_path: Path) -> None:
    source = Fragile(Spoken(replace(SHORT, vocab_size=512)))
    ids = module.encode(source, TEXT)[:100]
    expected = run(source, ids)
    recipe = Recipe(method="gptq", embedding_bits=8, bits=9.0)
    errors = []
    for levels in ((4, 8), (4, 8, 16)):
        folder = tmp_path / str(len(levels))
        folder.mkdir()
        made, compression = compress(source, recipe, TEXT, folder, levels=levels)
        assert set(compression.half) == ({FRAGILE, "layers.1.up"} if 16 in levels else set())
        assert compression.bits == pytest.approx(mean_bits(made))
        assert compression.bits <= 9
        errors.append(np.abs(run(made, ids) - expected).mean())
    assert errors[1] < 0.1 * errors[0]


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


@pytest.mark.parametrize(
    "given",
    [{"group": 48}, {"group": 256}, {"embedding_bits": 3}, {"activation_bits": 4}, {"bits": 4.0}, {"bits": 17.0}],
)
def test_recipes_that_cannot_be(given: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        Recipe(**given)  # type: ignore[arg-type]
