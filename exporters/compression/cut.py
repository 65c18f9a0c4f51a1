"""What is cut out of a network, and the network without it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from exporters.architecture import Architecture
from exporters.checkpoint import Checkpoint, CheckpointView
from exporters.compression.tensor_folder import TensorFolder
from exporters.weights import QuantizedTensor, Tensor, dequantize

Index = NDArray[np.intp]


@dataclass(frozen=True)
class Cut:
    """By the layer numbers of the whole network."""

    layers: frozenset[int] = frozenset()
    """That are gone."""
    groups: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """KV groups, each with its query heads, that a layer keeps; not there: all."""
    neurons: Mapping[int, Index] = field(default_factory=dict)
    """Of the MLP, that a layer keeps, ascending; not there: all."""

    def touches_before(self, layer: int, leaf: str) -> bool:
        """Whether the product ``leaf`` (``o`` or ``down``) of ``layer`` comes at a cut, or after one."""
        cut = [*self.layers, *self.groups, *(each for each in self.neurons if each < layer or leaf == "down")]
        return any(each <= layer for each in cut)


def kept_columns(arch: Architecture, cut: Cut, name: str) -> Index:
    """Of ``layers.N.o`` or ``layers.N.down``."""
    _, index, leaf = name.split(".")
    layer = int(index)
    if leaf == "down":
        return cut.neurons.get(layer, np.arange(arch.inner(layer)))
    return _channels(arch, cut, layer, arch.heads_per_group)


def _channels(arch: Architecture, cut: Cut, layer: int, heads: int) -> Index:
    """Of the groups that are kept, with so many ``heads`` each."""
    groups = np.array(cut.groups.get(layer, range(arch.kv_heads(layer))), np.intp)
    width = heads * arch.head_dim
    return np.asarray((groups[:, None] * width + np.arange(width)).reshape(-1))


class CutCheckpoint(CheckpointView):
    """``base`` without what is cut; ``o``, ``down`` and their biases as in ``fitted``, where they are there."""

    def __init__(self, base: Checkpoint, cut: Cut, fitted: TensorFolder | None = None) -> None:
        super().__init__(base)
        self._cut = cut
        self._fitted = fitted
        arch = base.architecture
        self._kept = [index for index in range(arch.num_layers) if index not in cut.layers]
        layers = tuple(
            replace(
                arch.layers[index],
                num_kv_heads=len(cut.groups[index]) if index in cut.groups else arch.layers[index].num_kv_heads,
                intermediate_size=(
                    len(cut.neurons[index]) if index in cut.neurons else arch.layers[index].intermediate_size
                ),
            )
            for index in self._kept
        )
        biased = fitted is not None
        most = max(layer.num_kv_heads or arch.num_kv_heads for layer in layers)
        self._architecture = replace(
            arch,
            layers=layers,
            num_kv_heads=most,
            num_heads=most * arch.heads_per_group,
            o_bias=arch.o_bias or biased,
            down_bias=arch.down_bias or biased,
        )

    @property
    def architecture(self) -> Architecture:
        return self._architecture

    def tensor(self, name: str) -> Tensor:
        if not name.startswith("layers."):
            return self._base.tensor(name)
        _, index, leaf = name.split(".", 2)
        layer = self._kept[int(index)]
        whole = f"layers.{layer}.{leaf}"
        if self._fitted is not None and whole in self._fitted:
            return self._fitted[whole]
        arch = self._base.architecture
        if leaf in ("o.bias", "down.bias"):
            there = arch.o_bias if leaf == "o.bias" else arch.down_bias
            return self._base.tensor(whole) if there else np.zeros(arch.hidden_size, np.float32)
        tensor = self._base.tensor(whole)
        part = leaf.partition(".")[0]
        if part in ("o", "down"):
            changed = layer in (self._cut.groups if part == "o" else self._cut.neurons)
            return take_columns(tensor, kept_columns(arch, self._cut, whole)) if changed else tensor
        if part in ("q", "k", "v") and layer in self._cut.groups:
            return take_rows(tensor, _channels(arch, self._cut, layer, arch.heads_per_group if part == "q" else 1))
        if part in ("gate", "up") and layer in self._cut.neurons:
            return take_rows(tensor, self._cut.neurons[layer])
        return tensor


def take_rows(tensor: Tensor, rows: Index) -> Tensor:
    return tensor.take_rows(rows) if isinstance(tensor, QuantizedTensor) else tensor[rows]


def take_columns(tensor: Tensor, columns: Index) -> Tensor:
    """Codes stay codes where whole groups are kept."""
    if isinstance(tensor, QuantizedTensor):
        group = tensor.group
        groups = columns[::group] // group
        if len(columns) % group == 0 and (columns == (groups[:, None] * group + np.arange(group)).reshape(-1)).all():
            return QuantizedTensor(
                tensor.codes[:, columns], tensor.scale[:, groups], tensor.zero[:, groups], tensor.bits
            )
    return np.ascontiguousarray(dequantize(tensor)[:, columns])
