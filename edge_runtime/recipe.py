"""How a model was made smaller: asked for on the command line, followed by the exporters, kept with each variant."""

from __future__ import annotations

from typing import Literal

import msgspec

from edge_runtime.errors import ConfigError

Method = Literal["nearest", "gptq", "awq", "awq+gptq"]
GROUPS = (16, 32, 64, 128)


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """ConfigError for what cannot be."""

    method: Method = "nearest"
    """How matrices are rounded. ``nearest``: each weight by itself; ``gptq``: with errors made good by later weights
    (arXiv 2210.17323); ``awq``: inputs that matter are scaled up first (arXiv 2306.00978)."""
    group: int = 32
    """Columns of a 4-bit matrix that share a scale."""
    symmetric: bool = False
    """4-bit codes around 8, without zero points."""
    embedding_bits: int = 8
    """4 or 8, of embedding and head."""
    bits: float | None = None
    """A weight's bits on average, scales and zero points included: matrices whose rounding moves the output most have 8
    bits, as many as fit. None: all have 4."""

    def __post_init__(self) -> None:
        if self.group not in GROUPS:
            raise ConfigError(f"a group has {', '.join(map(str, GROUPS))} columns, not {self.group}")
        if self.embedding_bits not in (4, 8):
            raise ConfigError(f"embedding and head have 4 or 8 bits, not {self.embedding_bits}")
        if self.bits is not None and not 4 < self.bits <= 9:
            raise ConfigError(f"bits must be above 4 and at most 9, scales included, not {self.bits:g}")

    @property
    def calibrated(self) -> bool:
        """It takes a text."""
        return self.method != "nearest" or self.bits is not None


PLAIN = Recipe()


class Calibration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The text that a recipe was followed by."""

    name: str
    sha256: str
    tokens: int


class Compression(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """What was done by a recipe, and what it cost."""

    recipe: Recipe
    calibration: Calibration | None = None
    bits: float
    """A weight's on average, scales (float16) and zero points included."""
    wide: tuple[str, ...] = ()
    """Matrices that have 8 bits where others have 4."""
    quality: dict[str, float] = {}
    """Beside the source in float32, on ``evaluated`` tokens of texts that come along: ``kl``, ``top1``, ``top5``, … as
    :class:`edge_runtime.evaluation.metrics.Figures` says; activations are not rounded there."""
    evaluated: int = 0
