"""Rounds by a recipe: a checkpoint becomes one whose matrices are rounded."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import ConfigError
from edge_runtime.recipe import Calibration, Compression, Recipe
from edge_runtime.tokenizer_json import open_tokenizer
from exporters.builder import Levels
from exporters.checkpoint import Checkpoint
from exporters.compression.budget import NARROW, Precision, choose_levels, mean_bits, stored_bits
from exporters.compression.calibrated import round_along
from exporters.compression.rounding import Inputs, compensated, nearest
from exporters.compression.scaling import ScaledCheckpoint, find_scales
from exporters.compression.sensitivity import sensitivities
from exporters.compression.tensor_folder import ReplacedCheckpoint, TensorFolder
from exporters.hf_names import tensor_shape
from exporters.network import tensor_names
from exporters.quantize import MIN_GROUP, fitting_group, quantize
from exporters.weights import QuantizedTensor, Tensor, dequantize

WINDOW = 512
"""Tokens of a text that are looked at together."""
MOST_WINDOWS = 24
LEAST_TOKENS = 256
LEVELS: Levels = (4, 8, 16)
SCAN_TOKENS = 256
"""Of which the sensitivity of each matrix is learned."""
Progress = Callable[[str, int, int], None]
"""``progress(what, done, total)`` in layers."""


@dataclass(frozen=True)
class Text:
    """To calibrate by."""

    name: str
    text: str


def compress(
    source: Checkpoint,
    recipe: Recipe,
    text: Text | None,
    folder: Path,
    progress: Progress | None = None,
    levels: Levels = LEVELS,
) -> tuple[Checkpoint, Compression]:
    """As :class:`Rounding`, for once."""
    return Rounding(source, recipe, text, progress)(folder, levels)


class Rounding:
    """What ``recipe`` makes of ``source``: learned from ``text``, which a calibrated one needs, and then done as often
    as there are kinds of graphs."""

    def __init__(self, source: Checkpoint, recipe: Recipe, text: Text | None, progress: Progress | None = None) -> None:
        """ConfigError for a text that is too short."""
        self._report = progress or (lambda what, done, total: None)
        self._source = source
        self._recipe = recipe
        self._ids: NDArray[np.int64] | None = None
        self._calibration: Calibration | None = None
        self._options: Mapping[str, Sequence[Precision]] = {}
        if not recipe.calibrated:
            return
        assert text is not None
        self._ids, self._calibration = windows(source, text)
        if recipe.method in ("awq", "awq+gptq"):
            scales = find_scales(source, self._ids, recipe.group, recipe.symmetric, self._progress("scaling"))
            self._source = ScaledCheckpoint(source, scales)
        if recipe.bits is not None:
            tokens = self._ids.reshape(-1)[:SCAN_TOKENS]
            self._options = sensitivities(self._source, tokens, self._candidates, self._progress("sensitivity"))

    def __call__(self, folder: Path, levels: Levels = LEVELS) -> tuple[Checkpoint, Compression]:
        """Tensors are kept in ``folder`` as long as the checkpoint is read. ``levels``: that the graph's engine takes
        side by side. ConfigError for a size that cannot be reached."""
        source, recipe, tensors = self._source, self._recipe, TensorFolder(folder)
        chosen = self._chosen(levels)
        if self._ids is None or recipe.method in ("nearest", "awq"):
            _round_each(source, recipe, tensors, chosen)
        else:
            round_along(source, self._ids, _Rounder(recipe, chosen), tensors, self._progress("rounding"))
            if "embed" not in tensors:
                tensors["embed"] = _plain(source.tensor("embed"), recipe.embedding_bits, recipe)
        made = ReplacedCheckpoint(source, tensors)
        return made, Compression(
            recipe=recipe,
            calibration=self._calibration,
            bits=mean_bits(made),
            wide=tuple(sorted(name for name, level in chosen.items() if level == 8)),
            half=tuple(sorted(name for name, level in chosen.items() if level == 16)),
        )

    def _progress(self, what: str) -> Callable[[int, int], None]:
        return partial(self._report, what)

    def _candidates(self, name: str, tensor: Tensor) -> Mapping[int, Tensor]:
        found = {level: _plain(tensor, level, self._recipe) for level in (NARROW, 8)}
        whole = tensor.shape[1] % MIN_GROUP == 0  # others stay as they are
        if whole and not isinstance(tensor, QuantizedTensor) and np.abs(tensor).max() <= np.finfo(np.float16).max:
            found[16] = _plain(tensor, 16, self._recipe)
        return found

    def _chosen(self, levels: Levels) -> Mapping[str, int]:
        if self._recipe.bits is None:
            return {}
        arch, recipe = self._source.architecture, self._recipe
        sizes = {name: math.prod(shape) for name in tensor_names(arch) if len(shape := tensor_shape(arch, name)) == 2}
        options = {name: [each for each in found if each.level in levels] for name, found in self._options.items()}
        outer = {  # by name: a source that comes rounded may have other blocks in each
            name: stored_bits(_plain(self._source.tensor(name), recipe.embedding_bits, recipe))
            for name in sizes.keys() - options.keys()
        }
        return choose_levels(recipe, sizes, options, outer)


class _Rounder:
    """Rounds with errors made good."""

    def __init__(self, recipe: Recipe, levels: Mapping[str, int]) -> None:
        self._recipe = recipe
        self._levels = levels

    def __call__(self, name: str, tensor: Tensor, inputs: Inputs) -> Tensor:
        recipe, bits = self._recipe, _bits_for(name, self._recipe, self._levels)
        group = fitting_group(tensor.shape[1], recipe.group)
        if bits != NARROW or group is None or _is_so_already(tensor, recipe):
            return _plain(tensor, bits, recipe)
        return compensated(dequantize(tensor), inputs, bits, group, recipe.symmetric)


def _round_each(source: Checkpoint, recipe: Recipe, tensors: TensorFolder, levels: Mapping[str, int]) -> None:
    for name in tensor_names(source.architecture):
        tensor = source.tensor(name)
        if len(tensor.shape) == 2:
            tensors[name] = _plain(tensor, _bits_for(name, recipe, levels), recipe)


def _bits_for(name: str, recipe: Recipe, levels: Mapping[str, int]) -> int:
    return recipe.embedding_bits if name in ("embed", "head") else levels.get(name, NARROW)


def _plain(tensor: Tensor, bits: int, recipe: Recipe) -> Tensor:
    """Each weight by itself; what has the wanted form already stays as it is."""
    if bits == 16:
        return dequantize(tensor).astype(np.float16)
    if bits == 8:
        return tensor if isinstance(tensor, QuantizedTensor) else quantize(dequantize(tensor), 8, 32)
    if _is_so_already(tensor, recipe):
        return tensor
    group = fitting_group(tensor.shape[1], recipe.group)
    return dequantize(tensor) if group is None else nearest(dequantize(tensor), 4, group, recipe.symmetric)


def _is_so_already(tensor: Tensor, recipe: Recipe) -> bool:
    """A 4-bit block of a source is not rounded a second time if it is what is wanted."""
    if not isinstance(tensor, QuantizedTensor) or tensor.bits != 4 or tensor.group > recipe.group:
        return False
    return tensor.group == recipe.group and (not recipe.symmetric or bool((tensor.zero == 8).all()))


def windows(source: Checkpoint, text: Text) -> tuple[NDArray[np.int64], Calibration]:
    """(windows, tokens) of a text."""
    ids = encode(source, text)
    if len(ids) < LEAST_TOKENS:
        raise ConfigError(
            f"the calibration text {text.name} has {len(ids)} tokens; it takes {LEAST_TOKENS} at least, and some "
            "thousands are better"
        )
    size = min(WINDOW, len(ids), source.architecture.max_context)
    count = min(len(ids) // size, MOST_WINDOWS)
    sha256 = hashlib.sha256(text.text.encode()).hexdigest()
    return ids[: count * size].reshape(count, size), Calibration(text.name, sha256, count * size)


def encode(source: Checkpoint, text: Text) -> NDArray[np.int64]:
    """Ids, without special tokens."""
    tokenizer = open_tokenizer(source.text.tokenizer_json)
    tokenizer.no_truncation()
    return np.array(tokenizer.encode(text.text, add_special_tokens=False).ids, np.int64)
