"""Prunes a network: ranks its parts, decides what is cut, and repairs what is left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import ConfigError
from edge_runtime.recipe import Prune, Ranking
from exporters.architecture import Architecture
from exporters.builder import Linear
from exporters.checkpoint import Checkpoint
from exporters.compression.allocation import EIGHTHS, Option, group_options, neuron_options, solve
from exporters.compression.cut import Cut, CutCheckpoint, Index
from exporters.compression.numpy_network import Array, NumpyNetwork
from exporters.compression.ranking import SHARES, neuron_importance, rank
from exporters.compression.repair import repair
from exporters.compression.tensor_folder import TensorFolder
from exporters.network import build
from exporters.weights import dequantize

RANKED_TOKENS = 256
"""Of a text, by which parts are ranked."""
_WIDTH = 32
"""Neurons stay in multiples of so many: a group of 4-bit weights, and what vector units take."""
Report = Callable[[str, int, int], None]
"""``report(what, done, total)``."""


class Costs(Protocol):
    """What a layer costs by its shape, in any one unit."""

    def attention(self, kv_heads: int) -> float: ...

    def mlp(self, neurons: int) -> float: ...

    def rest(self) -> float:
        """All that is not a layer's."""


class WeightCosts:
    """In weights of matrices."""

    def __init__(self, arch: Architecture) -> None:
        self._arch = arch

    def attention(self, kv_heads: int) -> float:
        return float(kv_heads * self._arch.hidden_size * self._arch.head_dim * 2 * (1 + self._arch.heads_per_group))

    def mlp(self, neurons: int) -> float:
        return float(3 * self._arch.hidden_size * neurons)

    def rest(self) -> float:
        return float((1 if self._arch.tied_head else 2) * self._arch.vocab_size * self._arch.hidden_size)


class PrunedModel(NamedTuple):
    checkpoint: Checkpoint
    unrepaired: Checkpoint
    """The same cut, and nothing refitted."""
    ranking: Ranking
    cut: Cut


def prune(
    source: Checkpoint, wish: Prune, ids: NDArray[np.int64], folder: Path, costs: Costs, report: Report
) -> PrunedModel:
    """By a text, ``ids`` (windows, tokens); refitted tensors are kept in ``folder``. ConfigError for a cut that leaves
    nothing, or a target that none reaches."""
    ranking = rank(source, ids.reshape(-1)[:RANKED_TOKENS], lambda *at: report("ranking", *at))
    cut = _decide(source, wish, ranking, costs, ids)
    unrepaired = CutCheckpoint(source, cut)
    if not wish.repair:
        return PrunedModel(unrepaired, unrepaired, ranking, cut)
    fitted = TensorFolder(folder)
    repair(source, cut, ids, fitted, lambda *at: report("repair", *at))
    return PrunedModel(CutCheckpoint(source, cut, fitted), unrepaired, ranking, cut)


def _decide(source: Checkpoint, wish: Prune, ranking: Ranking, costs: Costs, ids: NDArray[np.int64]) -> Cut:
    arch = source.architecture
    if wish.layers >= arch.num_layers:
        raise ConfigError(f"the model has {arch.num_layers} layers: cutting {wish.layers} leaves nothing")
    gone = frozenset(sorted(range(arch.num_layers), key=lambda index: ranking.layer_loss[index])[: wish.layers])
    left = [index for index in range(arch.num_layers) if index not in gone]
    if wish.target is None:
        groups, eighths = _by_shares(arch, wish, ranking, left)
    else:
        groups, eighths = _by_target(arch, wish, ranking, left, costs)
    kept_groups = {
        index: tuple(sorted(np.argsort(ranking.group_loss[index], kind="stable")[count:].tolist()))
        for index, count in zip(left, groups, strict=True)
        if count
    }
    widths = {
        index: neurons_left(arch.inner(index), count) for index, count in zip(left, eighths, strict=True) if count
    }
    return Cut(gone, kept_groups, _neurons(source, widths, ids.reshape(-1)[: 8 * RANKED_TOKENS]))


def neurons_left(inner: int, eighths: int) -> int:
    """Without so many eighths; a multiple of 32 where there are as many."""
    left = inner * (EIGHTHS - eighths) / EIGHTHS
    return max(round(left / _WIDTH), 1) * _WIDTH if inner > _WIDTH else max(round(left), 1)


def _by_shares(arch: Architecture, wish: Prune, ranking: Ranking, left: Sequence[int]) -> tuple[list[int], list[int]]:
    """For each layer that is left: KV groups and eighths of its neurons that are cut."""
    heads = [group_options(ranking.group_loss[index], range(arch.kv_heads(index))) for index in left]
    total = sum(arch.kv_heads(index) for index in left)
    most = total - len(left)
    groups = round(wish.heads * total)
    if wish.heads and not groups:
        raise ConfigError(f"heads={wish.heads:g} cuts none of {total} KV groups: one is {1 / total:.3f}")
    if groups > most:
        raise ConfigError(
            f"heads={wish.heads:g} would cut {groups} of {total} KV groups, and each of {len(left)} "
            f"layers keeps one: at most {most / total:.3f}"
        )
    if wish.mlp > (EIGHTHS - 1) / EIGHTHS:
        raise ConfigError(f"mlp={wish.mlp:g} leaves too little: at most {(EIGHTHS - 1) / EIGHTHS:g}")
    neurons = [_neuron_options(ranking, index, range(EIGHTHS)) for index in left]
    return solve(heads, groups), solve(neurons, wish.mlp * EIGHTHS * len(left))


def _by_target(
    arch: Architecture, wish: Prune, ranking: Ranking, left: Sequence[int], costs: Costs
) -> tuple[list[int], list[int]]:
    heads, neurons = [], []
    for index in left:
        groups, inner = arch.kv_heads(index), arch.inner(index)
        by_groups = [costs.attention(groups) - costs.attention(groups - cut) for cut in range(groups)]
        by_neurons = [costs.mlp(inner) - costs.mlp(neurons_left(inner, cut)) for cut in range(EIGHTHS)]
        heads.append(group_options(ranking.group_loss[index], by_groups))
        neurons.append(_neuron_options(ranking, index, by_neurons))
    parts = heads + neurons
    most = sum(max(option.saved for option in part) for part in parts)
    if wish.target == "loss":
        chosen = _within_loss(parts, wish.to, most)
    else:
        whole = costs.rest() + sum(
            costs.attention(arch.kv_heads(index)) + costs.mlp(arch.inner(index)) for index in range(arch.num_layers)
        )
        gone = sum(
            costs.attention(arch.kv_heads(index)) + costs.mlp(arch.inner(index))
            for index in range(arch.num_layers)
            if index not in left
        )
        if whole - gone - most > wish.to * whole:
            raise ConfigError(
                f"{wish.target}={wish.to:g} cannot be reached: with one KV group and an eighth of the neurons in each "
                f"layer {(whole - gone - most) / whole:.2f} is left"
            )
        chosen = solve(parts, (1 - wish.to) * whole - gone)
    return chosen[: len(left)], chosen[len(left) :]


def _within_loss(parts: Sequence[Sequence[Option]], loss: float, most: float) -> list[int]:
    """What saves most, by bisection."""
    best, low, high = [0] * len(parts), 0.0, most
    for _ in range(12):
        middle = (low + high) / 2
        chosen = solve(parts, middle)
        if sum(part[number].loss for part, number in zip(parts, chosen, strict=True)) <= loss:
            best, low = chosen, middle
        else:
            high = middle
    if not any(best):
        raise ConfigError(f"loss={loss:g} nats a token is less than any cut costs")
    return best


def _neuron_options(ranking: Ranking, index: int, saved: Sequence[float]) -> list[Option]:
    return neuron_options(SHARES, ranking.neuron_loss[index], saved)


def _neurons(source: Checkpoint, widths: dict[int, int], ids: NDArray[np.int64]) -> dict[int, Index]:
    if not widths:
        return {}
    network = _Important(source, widths, ids)
    build(source, network)
    return network.kept


class _Important(NumpyNetwork):
    """Finds each layer's most important neurons."""

    def __init__(self, source: Checkpoint, widths: dict[int, int], ids: NDArray[np.int64]) -> None:
        size = min(len(ids), 512)
        super().__init__(ids[: len(ids) // size * size].reshape(-1, size), source.architecture.rope_switch)
        self._widths = widths
        self.kept: dict[int, Index] = {}

    def linear(self, x: Array, parts: Sequence[Linear], name: str) -> Array:
        _, index, leaf = name.split(".")
        if leaf == "down" and int(index) in self._widths:
            order = np.argsort(-neuron_importance(x, dequantize(parts[0][0])), kind="stable")
            self.kept[int(index)] = np.sort(order[: self._widths[int(index)]])
        return super().linear(x, parts, name)
