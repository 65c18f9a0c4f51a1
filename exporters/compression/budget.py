"""Which matrices have 8 bits, so that a model has so many bits a weight on average."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from edge_runtime.errors import ConfigError
from edge_runtime.recipe import Recipe
from exporters.architecture import Architecture
from exporters.checkpoint import Checkpoint
from exporters.hf_names import tensor_shape
from exporters.network import tensor_names
from exporters.weights import QuantizedTensor

_SCALE_BITS, _WIDE_GROUP = 16, 32


def bits_of_weight(bits: int, recipe: Recipe) -> float:
    """With its share of a scale (float16) and, of 4 bits, a zero point."""
    if bits == 8:
        return 8 + _SCALE_BITS / _WIDE_GROUP
    return 4 + (_SCALE_BITS + (0 if recipe.symmetric else 4)) / recipe.group


def mean_bits(checkpoint: Checkpoint, float_bits: int = 32) -> float:
    """Of the weights in matrices, as they are, with its share of scale and zero point; a float has ``float_bits``."""
    spent = count = 0.0
    for name in tensor_names(checkpoint.architecture):
        tensor = checkpoint.tensor(name)
        if len(tensor.shape) == 2:
            size = math.prod(tensor.shape)
            count += size
            spent += size * (_bits_of(tensor) if isinstance(tensor, QuantizedTensor) else float_bits)
    return spent / count


def _bits_of(tensor: QuantizedTensor) -> float:
    zero = tensor.bits if (tensor.zero == np.rint(tensor.zero)).all() else 16  # GGUF's Q4_1 has fractional ones
    if (tensor.zero == 2 ** (tensor.bits - 1)).all():
        zero = 0
    return tensor.bits + (_SCALE_BITS + zero) / tensor.group


def wide_tensors(arch: Architecture, recipe: Recipe, sensitivity: Mapping[str, float]) -> frozenset[str]:
    """Of ``sensitivity`` those that have 8 bits: the ones whose rounding moves the output most for their size.

    ConfigError where even none would pass ``recipe.bits``.
    """
    assert recipe.bits is not None
    narrow, wide = bits_of_weight(4, recipe), bits_of_weight(8, recipe)
    sizes = {name: math.prod(shape) for name in tensor_names(arch) if len(shape := tensor_shape(arch, name)) == 2}
    outer = bits_of_weight(recipe.embedding_bits, recipe)
    spent = sum(size * (outer if name in ("embed", "head") else narrow) for name, size in sizes.items())
    total = sum(sizes.values())
    if spent > recipe.bits * total:
        raise ConfigError(
            f"with groups of {recipe.group} and {recipe.embedding_bits} bits for embedding and head a weight has "
            f"{spent / total:.2f} bits, more than the {recipe.bits:g} wanted: take a larger group or --embedding-bits 4"
        )
    chosen = []
    for name in sorted(sensitivity, key=lambda name: -sensitivity[name] / sizes[name]):
        more = sizes[name] * (wide - narrow)
        if spent + more <= recipe.bits * total:
            spent += more
            chosen.append(name)
    return frozenset(chosen)
