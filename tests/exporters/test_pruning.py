"""What the parts of a network do, and where it is cut."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_runtime.cli.recipes import parse_prune
from edge_runtime.errors import ConfigError
from edge_runtime.evaluation.metrics import log_softmax
from edge_runtime.recipe import Prune
from exporters.builder import Linear
from exporters.checkpoint import Checkpoint
from exporters.compression.allocation import Option, solve
from exporters.compression.cut import Cut, CutCheckpoint
from exporters.compression.numpy_network import Array, NumpyNetwork
from exporters.compression.prune import WeightCosts, neurons_left, prune
from exporters.compression.ranking import rank
from exporters.hf_names import tensor_shape
from exporters.network import build, tensor_names
from exporters.weights import Tensor, dequantize
from tests.exporters.numpy_builder import run
from tests.exporters.random_checkpoint import SHORT, RandomCheckpoint

Logits = NDArray[np.float32]
RANDOM = np.random.default_rng(5)
IDS = RANDOM.integers(0, SHORT.vocab_size, 96)
FOUR = replace(SHORT, layers=SHORT.layers * 2)


def quiet(what: str, done: int, total: int) -> None:
    return


# --- ranking ----------------------------------------------------------------------------------------------------------


def test_losses_are_those_of_networks_without_the_part() -> None:
    """Each against a whole run of its own."""
    source = RandomCheckpoint(SHORT)
    ranking = rank(source, IDS)
    whole = run(source, IDS)
    for layer, group in itertools.product(range(2), range(2)):
        assert ranking.group_loss[layer][group] == pytest.approx(
            divergence(whole, run(_Mean(source, f"layers.{layer}.o", group), IDS)), rel=1e-3
        )
    for layer in range(2):
        without = CutCheckpoint(source, Cut(frozenset({layer})))
        assert ranking.layer_loss[layer] == pytest.approx(divergence(whole, run(without, IDS)), rel=1e-3)
        assert list(ranking.neuron_loss[layer]) == sorted(ranking.neuron_loss[layer])
    assert len(ranking.head_energy[0]) == SHORT.num_heads
    fluctuation, energy = np.array(ranking.head_fluctuation), np.array(ranking.head_energy)
    assert (fluctuation <= energy).all()


class _Mean(RandomCheckpoint):
    """Whose product ``name`` has the mean in the place of a group's heads."""

    def __init__(self, base: Checkpoint, name: str, group: int) -> None:
        super().__init__(replace(base.architecture, o_bias=True))
        width = SHORT.heads_per_group * SHORT.head_dim
        part = slice(group * width, (group + 1) * width)
        seen = _Inputs(IDS, name)
        build(base, seen)
        weight = dequantize(base.tensor(name)).copy()
        self._bias = {f"{name}.bias": weight[:, part] @ seen.inputs[:, part].mean(0)}
        weight[:, part] = 0
        self._base, self._changed = base, {name: weight}

    def tensor(self, name: str) -> Tensor:
        if name.endswith(".bias"):
            return self._bias.get(name, np.zeros(SHORT.hidden_size, np.float32))
        return self._changed[name] if name in self._changed else self._base.tensor(name)


class _Inputs(NumpyNetwork):
    def __init__(self, ids: NDArray[np.int64], name: str) -> None:
        super().__init__(ids[None])
        self._name = name

    def linear(self, x: Array, parts: Sequence[Linear], name: str) -> Array:
        if name == self._name:
            self.inputs = x
        return super().linear(x, parts, name)


def divergence(whole: Logits, other: Logits) -> float:
    p, q = log_softmax(whole), log_softmax(other)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


# --- where to cut -----------------------------------------------------------------------------------------------------


def test_the_solution_is_the_best_of_all() -> None:
    for _ in range(20):
        parts = [
            [Option(0, 0), *(Option(float(RANDOM.integers(1, 9)), float(RANDOM.random())) for _ in range(3))]
            for _ in range(4)
        ]
        wanted = 10.0
        every = list(itertools.product(*parts))
        possible = [each for each in every if sum(option.saved for option in each) >= wanted]
        if not possible:
            with pytest.raises(ValueError, match="do not save"):
                solve(parts, wanted)
            continue
        chosen = [part[number] for part, number in zip(parts, solve(parts, wanted), strict=True)]
        assert sum(option.saved for option in chosen) >= wanted
        best = min(sum(option.loss for option in each) for each in possible)
        assert sum(option.loss for option in chosen) == pytest.approx(best)
    assert solve(parts, 0) == [0] * 4


def test_all_that_there_is_can_be_wanted() -> None:
    parts = [[Option(0, 0), Option(1 / 3, 0.5)] for _ in range(7)]
    assert solve(parts, sum(part[1].saved for part in parts)) == [1] * 7
    assert sum(solve(parts, 1.0)) == 3


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        (Prune(layers=4), "leaves nothing"),
        (Prune(heads=0.9), "at most 0.500"),
        (Prune(heads=0.05), "cuts none of 8 KV groups: one is 0.125"),
        (Prune(mlp=0.95), "leaves too little"),
        (Prune(target="bytes", to=0.05), "cannot be reached"),
        (Prune(target="loss", to=1e-9), "less than any cut"),
    ],
)
def test_cuts_that_cannot_be(tmp_path: Path, wish: Prune, message: str) -> None:
    source = RandomCheckpoint(FOUR)
    with pytest.raises(ConfigError, match=message):
        prune(source, wish, IDS[None], tmp_path, WeightCosts(FOUR), quiet)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("heads=2", "at least 0 and below 1"),
        ("mlp=-1", "at least 0 and below 1"),
        ("layers=-1", "how many are cut"),
        ("layers=1.5", "whole number"),
        ("heads=a lot", "number, not 'a lot'"),
        ("tails=1", "none of heads"),
        ("heads", "NAME=VALUE"),
        ("heads=0.1,heads=0.2", "one too many"),
        ("bytes=0.5,loss=1", "one too many"),
        ("bytes=0.5,mlp=0.1", "leave heads and mlp out"),
        ("bytes=1.5", "between 0 and 1"),
        ("loss=0", "nats a token"),
        ("loss=inf", "nats a token"),
        ("loss=nan", "nats a token"),
        ("bytes=nan", "between 0 and 1"),
        ("heads=0", "nothing is to be pruned"),
        ("repair=maybe", "yes or no"),
        ("vocab=", "or script:NAME, not nothing"),
    ],
)
def test_what_the_command_line_refuses(words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_prune(words)


def test_shares_are_reached(tmp_path: Path) -> None:
    source = RandomCheckpoint(FOUR)
    made = prune(source, Prune(heads=0.25, mlp=0.25, layers=1), IDS[None], tmp_path, WeightCosts(FOUR), quiet)
    arch = made.checkpoint.architecture
    assert arch.num_layers == 3
    assert sum(arch.kv_heads(index) for index in range(3)) == 6 - round(0.25 * 6)
    assert sum(arch.inner(index) for index in range(3)) <= 0.75 * 3 * 128 + 32
    for name in tensor_names(arch):
        assert made.checkpoint.tensor(name).shape == tensor_shape(arch, name)


@pytest.mark.parametrize("share", [0.9, 0.7, 0.5])
def test_bytes_are_reached(tmp_path: Path, share: float) -> None:
    source, costs = RandomCheckpoint(FOUR), WeightCosts(FOUR)
    made = prune(source, Prune(target="bytes", to=share, repair=False), IDS[None], tmp_path, costs, quiet)

    def size(checkpoint: Checkpoint) -> int:
        shapes = (tensor_shape(checkpoint.architecture, name) for name in tensor_names(checkpoint.architecture))
        return sum(shape[0] * shape[1] for shape in shapes if len(shape) == 2)

    assert share - 0.12 < size(made.checkpoint) / size(source) < share + 0.01


def test_neurons_stay_in_multiples_of_32() -> None:
    assert [neurons_left(1536, cut) for cut in (0, 1, 7)] == [1536, 1344, 192]
    assert neurons_left(100, 4) == 64
    assert neurons_left(24, 4) == 12
