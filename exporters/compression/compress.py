"""Rounds by a recipe: a checkpoint becomes one whose matrices are rounded."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import ConfigError
from edge_runtime.recipe import Calibration, Compression, Recipe
from edge_runtime.tokenizer_json import open_tokenizer
from exporters.checkpoint import Checkpoint
from exporters.compression.budget import mean_bits, wide_tensors
from exporters.compression.calibrated import round_along
from exporters.compression.rounding import Inputs, compensated, nearest
from exporters.compression.scaling import ScaledCheckpoint, find_scales
from exporters.compression.sensitivity import sensitivities
from exporters.compression.tensor_folder import ReplacedCheckpoint, TensorFolder
from exporters.network import tensor_names
from exporters.quantize import fitting_group, quantize
from exporters.weights import QuantizedTensor, Tensor, dequantize

WINDOW = 512
"""Tokens of a text that are looked at together."""
MOST_WINDOWS = 24
LEAST_TOKENS = 256
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
    source: Checkpoint, recipe: Recipe, text: Text | None, folder: Path, progress: Progress | None = None
) -> tuple[Checkpoint, Compression]:
    """Follow ``recipe`` with ``text``, which a calibrated one needs. Tensors are kept in ``folder`` as
    long as the checkpoint is read. ConfigError for a text that is too short, or a size that cannot be reached."""
    report = progress or (lambda what, done, total: None)
    calibration, wide = None, frozenset[str]()
    tensors = TensorFolder(folder)
    if not recipe.calibrated:
        _round_each(source, recipe, tensors)
        return _finished(source, recipe, tensors)
    assert text is not None
    ids, calibration = windows(source, text)
    if recipe.method in ("awq", "awq+gptq"):
        scales = find_scales(source, ids, recipe.group, recipe.symmetric, lambda *at: report("scaling", *at))
        source = ScaledCheckpoint(source, scales)
    if recipe.bits is not None:
        scan = sensitivities(
            source,
            ids.reshape(-1)[:SCAN_TOKENS],
            lambda name, value: _plain(value, 4, recipe, name),
            lambda *at: report("sensitivity", *at),
        )
        wide = wide_tensors(source.architecture, recipe, scan)
    if recipe.method in ("nearest", "awq"):
        _round_each(source, recipe, tensors, wide)
    else:
        round_along(source, ids, _Rounder(recipe, wide), tensors, lambda *at: report("rounding", *at))
        if "embed" not in tensors:
            tensors["embed"] = _plain(source.tensor("embed"), recipe.embedding_bits, recipe, "embed")
    return _finished(source, recipe, tensors, calibration, wide)


def _finished(
    source: Checkpoint,
    recipe: Recipe,
    tensors: TensorFolder,
    calibration: Calibration | None = None,
    wide: frozenset[str] = frozenset(),
) -> tuple[Checkpoint, Compression]:
    made = ReplacedCheckpoint(source, tensors)
    bits = mean_bits(made)
    return made, Compression(recipe=recipe, calibration=calibration, bits=bits, wide=tuple(sorted(wide)))


class _Rounder:
    """Rounds with errors made good."""

    def __init__(self, recipe: Recipe, wide: frozenset[str]) -> None:
        self._recipe = recipe
        self._wide = wide

    def __call__(self, name: str, tensor: Tensor, inputs: Inputs) -> Tensor:
        recipe, bits = self._recipe, bits_for(name, self._recipe, self._wide)
        group = fitting_group(tensor.shape[1], recipe.group)
        if bits == 8 or group is None or _is_so_already(tensor, recipe):
            return _plain(tensor, bits, recipe, name)
        return compensated(dequantize(tensor), inputs, bits, group, recipe.symmetric)


def _round_each(source: Checkpoint, recipe: Recipe, tensors: TensorFolder, wide: frozenset[str] = frozenset()) -> None:
    for name in tensor_names(source.architecture):
        tensor = source.tensor(name)
        if len(tensor.shape) == 2:
            tensors[name] = _plain(tensor, bits_for(name, recipe, wide), recipe, name)


def bits_for(name: str, recipe: Recipe, wide: frozenset[str]) -> int:
    if name in ("embed", "head"):
        return recipe.embedding_bits
    return 8 if name in wide else 4


def _plain(tensor: Tensor, bits: int, recipe: Recipe, name: str) -> Tensor:
    """Each weight by itself; what has the wanted form already stays as it is."""
    if bits == 8:
        return tensor if isinstance(tensor, QuantizedTensor) else quantize(tensor, 8, 32)
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
