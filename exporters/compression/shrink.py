"""Follows a recipe from end to end: prunes, rounds, and measures what it has cost."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from edge_runtime.package import Weights
from edge_runtime.recipe import Calibration, Compression, Pruned, Recipe
from exporters.builder import Levels
from exporters.checkpoint import Checkpoint
from exporters.compression.budget import mean_bits
from exporters.compression.compress import LEVELS, Rounding, Text, encode, windows
from exporters.compression.prune import Costs, PrunedModel, WeightCosts, prune
from exporters.compression.quality import Judge, compare
from exporters.compression.vocabulary import TrimmedCheckpoint, tokens_to_keep
from exporters.quantize import QuantizedCheckpoint

EVALUATED = 1024
"""Tokens of each text that are looked at to tell what was lost."""
Progress = Callable[[str, int, int], None]
"""``progress(what, done, total)`` in layers."""


@dataclass(frozen=True)
class Shrinking:
    """What is to be done to a model, and with what."""

    recipe: Recipe
    calibration: Text | None = None
    """None where the recipe takes none."""
    evaluation: Sequence[Text] = ()
    """Texts by which it is measured what it has cost."""
    make_judge: Callable[[], Judge] | None = None
    vocabulary: Text | None = None
    """Whose tokens are kept, where the recipe trims the vocabulary."""
    measure: Callable[[Checkpoint], Costs] | None = None
    """What layers cost by their shapes on a device, where the recipe has a latency to reach."""


def shrink(
    source: Checkpoint,
    shrinking: Shrinking,
    weights: Weights,
    folder: Path,
    progress: Progress | None = None,
    levels: Levels = LEVELS,
) -> tuple[Checkpoint, Compression]:
    """As :class:`Shrunk`, for once."""
    return Shrunk(source, shrinking, weights, folder, progress).rounded(levels)


class Shrunk:
    """The smaller model, whose tensors are kept in ``folder`` as long as it is read: cut once, and rounded for each
    kind of graph."""

    def __init__(
        self,
        source: Checkpoint,
        shrinking: Shrinking,
        weights: Weights,
        folder: Path,
        progress: Progress | None = None,
    ) -> None:
        """ConfigError for a text that is too short, and for a cut that cannot be."""
        self._report = progress or (lambda what, done, total: None)
        self._recipe = shrinking.recipe
        self._weights: Weights = weights
        self._folder = folder
        self._judged = _Judged(source, shrinking)
        self._cut, self._pruned, self._calibration = source, None, None
        if self._recipe.prune is not None:
            self._cut, self._pruned, self._calibration = _pruned(source, shrinking, self._judged, folder, self._report)
        self._rounding: Rounding | None = None
        self._last: Path | None = None
        if self._recipe.rounds:
            self._rounding = Rounding(self._cut, self._recipe, shrinking.calibration, self._report)

    def rounded(self, levels: Levels = LEVELS) -> tuple[Checkpoint, Compression]:
        """With what became of it; ``levels``: that the graph's engine takes. It can be read until the next is made,
        which takes its place on the disk. ConfigError for a size that cannot be."""
        made, weights = self._cut, self._weights
        if self._rounding is None:
            bits = mean_bits(QuantizedCheckpoint(made, weights), 16 if weights == "fp16" else 32)
            compression = Compression(recipe=self._recipe, calibration=self._calibration, bits=bits)
        else:
            if self._last is not None:
                shutil.rmtree(self._last, ignore_errors=True)
            self._last = Path(tempfile.mkdtemp(prefix="rounded-", dir=self._folder))
            made, compression = self._rounding(self._last, levels)
        quality, tokens = self._judged(QuantizedCheckpoint(made, weights), made, self._report)
        return made, msgspec.structs.replace(compression, pruned=self._pruned, quality=quality, evaluated=tokens)


class _Judged:
    """Measures models beside ``source``."""

    def __init__(self, source: Checkpoint, shrinking: Shrinking) -> None:
        self._source = source
        self._make_judge = shrinking.make_judge
        self._texts = shrinking.evaluation
        self.kept: np.ndarray | None = None
        """The source's tokens that the models have; None: all."""

    def __call__(self, model: Checkpoint, speaker: Checkpoint, report: Progress) -> tuple[dict[str, float], int]:
        """Figures, and of how many tokens; ``speaker`` has the model's tokenizer."""
        if self._make_judge is None:
            return {}, 0
        judge, tokens = self._make_judge(), 0
        for done, text in enumerate(self._texts):
            ids = encode(speaker, text)[: min(EVALUATED, speaker.architecture.max_context)]
            if len(ids) > 1:
                compare(model, self._source, ids, judge, self.kept)
                tokens += len(ids) - 1
            report("evaluation", done + 1, len(self._texts))
        return dict(judge.summary()), tokens


def _pruned(
    source: Checkpoint, shrinking: Shrinking, judged: _Judged, folder: Path, report: Progress
) -> tuple[Checkpoint, Pruned, Calibration | None]:
    wish, text = shrinking.recipe.prune, shrinking.calibration
    assert wish is not None
    made = source
    if wish.vocabulary is not None:
        texts = [] if shrinking.vocabulary is None else [shrinking.vocabulary.text]
        kept = tokens_to_keep(source, texts, wish.script)
        judged.kept, made = kept, TrimmedCheckpoint(source, kept)
    vocabulary = made.architecture.vocab_size if made is not source else None
    if not wish.cuts:
        return made, Pruned(vocabulary=vocabulary), None
    assert text is not None
    ids, calibration = windows(made, text)
    measure = shrinking.measure if wish.target == "latency" else None
    costs = WeightCosts(made.architecture) if measure is None else measure(made)
    (folder / "fitted").mkdir()
    result = prune(made, wish, ids, folder / "fitted", costs, report)
    after = judged(result.checkpoint, result.checkpoint, report)[0]
    before = judged(result.unrepaired, result.unrepaired, report)[0] if wish.repair else {}
    return result.checkpoint, _record(result, vocabulary, before, after), calibration


def _record(
    result: PrunedModel, vocabulary: int | None, before: Mapping[str, float], after: Mapping[str, float]
) -> Pruned:
    arch = result.checkpoint.architecture
    layers = range(arch.num_layers)
    return Pruned(
        ranking=result.ranking,
        layers=tuple(sorted(result.cut.layers)),
        kv_heads=tuple(arch.kv_heads(index) for index in layers),
        neurons=tuple(arch.inner(index) for index in layers),
        vocabulary=vocabulary,
        before_repair=dict(before),
        quality=dict(after),
    )
