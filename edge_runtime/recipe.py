"""How a model was made smaller: asked for on the command line, followed by the exporters, kept with each variant."""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from edge_runtime.errors import ConfigError

Method = Literal["nearest", "gptq", "awq", "awq+gptq"]
GROUPS = (16, 32, 64, 128)
SCRIPT = "script:"
Target = Literal["bytes", "latency", "loss"]


class Prune(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """What is cut out, before anything is rounded. ConfigError for what cannot be."""

    heads: float = 0.0
    """Share of all KV groups, each with its query heads; every layer keeps one."""
    mlp: float = 0.0
    """Share of all MLP neurons."""
    layers: int = 0
    """Whole layers."""
    target: Target | None = None
    """In place of ``heads`` and ``mlp``: cut both until it is reached."""
    to: float = 0.0
    """Of ``bytes`` and ``latency`` the share that is left, of ``loss`` nats a token."""
    repair: bool = True
    """What is left is refitted."""
    vocabulary: str | None = None
    """The SHA-256 of the text whose tokens are kept, or ``script:latin`` for those of a script. None: all are."""

    @property
    def script(self) -> str | None:
        """By which tokens are kept."""
        found = self.vocabulary or ""
        return found.removeprefix(SCRIPT) if found.startswith(SCRIPT) else None

    @property
    def cuts(self) -> bool:
        """More than the vocabulary."""
        return bool(self.heads or self.mlp or self.layers or self.target)

    def __post_init__(self) -> None:
        for name, value in (("heads", self.heads), ("mlp", self.mlp)):
            if not 0 <= value < 1:
                raise ConfigError(f"{name} is the share that is cut, at least 0 and below 1, not {value:g}")
        if self.layers < 0:
            raise ConfigError(f"layers is how many are cut, not {self.layers}")
        if self.target is not None:
            if self.heads or self.mlp:
                raise ConfigError(f"{self.target} decides how many heads and neurons are cut: leave heads and mlp out")
            if not 0 < self.to < (math.inf if self.target == "loss" else 1):
                what = "nats a token, above 0" if self.target == "loss" else "the share that is left, between 0 and 1"
                raise ConfigError(f"{self.target} is {what}, not {self.to:g}")
        elif not (self.cuts or self.vocabulary):
            raise ConfigError("nothing is to be pruned: give heads, mlp, layers, vocab or a target")


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
    """A weight's bits on average, scales and zero points included: matrices whose rounding moves the output most have
    8, or 16 where the engine takes them, as many as fit. None: all have 4."""
    activation_bits: int = 8
    """8 or 16, to which our own kernels round what meets 4-bit matrices; before queries, keys, values and head it is
    16 anyway."""
    prune: Prune | None = None

    def __post_init__(self) -> None:
        if self.group not in GROUPS:
            raise ConfigError(f"a group has {', '.join(map(str, GROUPS))} columns, not {self.group}")
        if self.embedding_bits not in (4, 8):
            raise ConfigError(f"embedding and head have 4 or 8 bits, not {self.embedding_bits}")
        if self.activation_bits not in (8, 16):
            raise ConfigError(f"activations are rounded to 8 or 16 bits, not {self.activation_bits}")
        if self.bits is not None and not 4 < self.bits <= 16:
            raise ConfigError(f"bits must be above 4 and at most 16, scales included, not {self.bits:g}")

    @property
    def calibrated(self) -> bool:
        """It takes a text."""
        return self.method != "nearest" or self.bits is not None or (self.prune is not None and self.prune.cuts)

    @property
    def rounds(self) -> bool:
        """It says more of rounding weights than that it is done."""
        return msgspec.structs.replace(self, prune=None, activation_bits=PLAIN.activation_bits) != PLAIN


PLAIN = Recipe()


class Calibration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The text that a recipe was followed by."""

    name: str
    sha256: str
    tokens: int


class Ranking(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What parts of the whole network do, on a text; losses are mean KL divergences, nats a token, of the output
    without that part alone."""

    head_energy: tuple[tuple[float, ...], ...]
    """(layers, query heads): mean square of what a head adds to the stream."""
    head_fluctuation: tuple[tuple[float, ...], ...]
    """The same without its mean."""
    group_loss: tuple[tuple[float, ...], ...]
    """(layers, KV groups)."""
    neuron_loss: tuple[tuple[float, ...], ...]
    """(layers, 3): without a quarter, a half and three quarters of the neurons, the least important ones."""
    layer_loss: tuple[float, ...]
    layer_change: tuple[float, ...]
    """1 - the mean cosine of the stream before and after a layer (ShortGPT, arXiv 2403.03853)."""


class Pruned(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """What was cut, by the numbers of the whole network."""

    ranking: Ranking | None = None
    layers: tuple[int, ...] = ()
    """Cut as a whole."""
    kv_heads: tuple[int, ...] = ()
    """That each other layer keeps."""
    neurons: tuple[int, ...] = ()
    vocabulary: int | None = None
    """Tokens that are left; None: all."""
    before_repair: dict[str, float] = {}
    """Beside the source, as ``Compression.quality``; nothing is rounded yet."""
    quality: dict[str, float] = {}
    """After repair."""

    @property
    def cut(self) -> tuple[object, ...]:
        """What was cut, without what it was decided by."""
        return self.layers, self.kv_heads, self.neurons, self.vocabulary


class Compression(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """What was done by a recipe, and what it cost."""

    recipe: Recipe
    calibration: Calibration | None = None
    bits: float
    """A weight's on average, scales (float16) and zero points included."""
    wide: tuple[str, ...] = ()
    """Matrices that have 8 bits where others have 4."""
    half: tuple[str, ...] = ()
    """Matrices that are float16."""
    quality: dict[str, float] = {}
    """Beside the source in float32, on ``evaluated`` tokens of texts that come along: ``kl``, ``top1``, ``top5``, … as
    :class:`edge_runtime.evaluation.metrics.Figures` says; activations are not rounded there."""
    evaluated: int = 0
    pruned: Pruned | None = None
