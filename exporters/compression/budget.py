"""How many bits each matrix has, so that a model has so many a weight on average."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from edge_runtime.errors import ConfigError
from edge_runtime.recipe import Recipe
from exporters.checkpoint import Checkpoint
from exporters.network import tensor_names
from exporters.weights import QuantizedTensor, Tensor, is_half

_SCALE_BITS = 16
NARROW = 4
"""The level that every matrix begins at."""


class Precision(NamedTuple):
    """What a matrix may become."""

    level: int
    bits: float
    """A weight's, scales and zero points included."""
    loss: float
    """What the rounding does to the output, nats a token."""


def stored_bits(tensor: Tensor, float_bits: int = 32) -> float:
    """A weight's, with its share of scales (float16) and zero points; one of float32 has ``float_bits``."""
    if not isinstance(tensor, QuantizedTensor):
        return 16 if is_half(tensor) else float_bits
    zero = tensor.bits if (tensor.zero == np.rint(tensor.zero)).all() else 16  # GGUF's Q4_1 has fractional ones
    if (tensor.zero == 2 ** (tensor.bits - 1)).all():
        zero = 0
    return tensor.bits + (_SCALE_BITS + zero) / tensor.group


def mean_bits(checkpoint: Checkpoint, float_bits: int = 32) -> float:
    """Of the weights in matrices, as :func:`stored_bits` counts them."""
    spent = count = 0.0
    for name in tensor_names(checkpoint.architecture):
        tensor = checkpoint.tensor(name)
        if len(tensor.shape) == 2:
            size = math.prod(tensor.shape)
            count += size
            spent += size * stored_bits(tensor, float_bits)
    return spent / count


def choose_levels(
    recipe: Recipe, sizes: Mapping[str, int], options: Mapping[str, Sequence[Precision]], outer: Mapping[str, float]
) -> dict[str, int]:
    """The level of each matrix in ``options`` that does not stay :data:`NARROW`, within ``recipe.bits`` on average.

    ``sizes``: weights of every matrix of the model; ``outer``: bits of those without options. One step after another
    is taken, always the one that saves the output most for each bit it costs, of those that fit:
    :func:`exporters.compression.allocation.solve` would be better by hundredths, but keeps a limit within its rounding
    only. ConfigError where even the narrowest pass ``recipe.bits``.
    """
    assert recipe.bits is not None
    now = {name: next(each for each in found if each.level == NARROW) for name, found in options.items()}
    spent = sum(size * (now[name].bits if name in now else outer[name]) for name, size in sizes.items())
    total = sum(sizes.values())
    room = recipe.bits * total - spent
    if room < 0:
        raise ConfigError(
            f"with groups of {recipe.group} and {recipe.embedding_bits} bits for embedding and head a weight has "
            f"{spent / total:.2f} bits, more than the {recipe.bits:g} wanted: take a larger group or --embedding-bits 4"
        )
    while True:
        best, most = None, 0.0
        for name, current in now.items():
            for option in options[name]:
                more = sizes[name] * (option.bits - current.bits)
                saved = current.loss - option.loss
                if 0 < more <= room and saved / more > most:
                    best, most = (name, option), saved / more
        if best is None:
            return {name: option.level for name, option in now.items() if option.level != NARROW}
        name, option = best
        room -= sizes[name] * (option.bits - now[name].bits)
        now[name] = option
