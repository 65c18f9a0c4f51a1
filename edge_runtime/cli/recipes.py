"""Recipes on the command line: how ``--prune`` is read, and how what was done is shown."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edge_runtime.errors import ConfigError
from edge_runtime.evaluation.texts import read_text
from edge_runtime.package import Variant
from edge_runtime.recipe import PLAIN, SCRIPT, Prune, Pruned, Recipe

_TARGETS = ("bytes", "latency", "loss")
_KNOWN = ("heads", "mlp", "layers", "vocab", *_TARGETS, "repair")


def parse_prune(words: str) -> tuple[Prune, Path | None]:
    """``heads=0.15,mlp=0.25,layers=2,vocab=FILE``, and the file whose words the vocabulary keeps. ConfigError."""
    given: dict[str, Any] = {}
    vocabulary: Path | None = None
    for word in words.split(","):
        name, equals, value = (part.strip() for part in word.partition("="))
        if not equals or name not in _KNOWN:
            raise ConfigError(f"--prune takes NAME=VALUE with a comma between; {word!r} is none of {', '.join(_KNOWN)}")
        if name in given or (name in _TARGETS and "target" in given) or (name == "vocab" and "vocabulary" in given):
            raise ConfigError(f"--prune: {name} is one too many")
        if name == "vocab" and value.startswith(SCRIPT):
            given["vocabulary"] = value
        elif name == "vocab" and not value:
            raise ConfigError(f"--prune: vocab is a file whose tokens are kept, or {SCRIPT}NAME, not nothing")
        elif name == "vocab":
            vocabulary = Path(value)
            given["vocabulary"] = hashlib.sha256(read_text(vocabulary).encode()).hexdigest()
        elif name == "repair":
            if value not in ("yes", "no"):
                raise ConfigError(f"--prune: repair is yes or no, not {value!r}")
            given["repair"] = value == "yes"
        elif name in _TARGETS:
            given |= {"target": name, "to": _number(name, value)}
        else:
            given[name] = int(_number(name, value, whole=True)) if name == "layers" else _number(name, value)
    return Prune(**given), vocabulary


def _number(name: str, value: str, whole: bool = False) -> float:
    try:
        return int(value) if whole else float(value)
    except ValueError as error:
        raise ConfigError(f"--prune: {name} is a {'whole ' if whole else ''}number, not {value!r}") from error


def compression_lines(variant: Variant) -> Iterator[str]:
    """What was done to a variant, and what it cost; nothing if nothing was."""
    made = variant.compression
    if made is None:
        return
    recipe = made.recipe
    learned = [f"by {text.tokens:,} tokens of {text.name}"] if (text := made.calibration) is not None else []
    if recipe.prune is not None and made.pruned is not None:
        parts = [*_pruned_parts(recipe.prune, made.pruned), *(learned if recipe.prune.cuts else ())]
        yield _line("pruned", ", ".join(parts))
        if made.pruned.before_repair:
            yield _line(
                "repair", f"{_figures(made.pruned.before_repair)} before, {_figures(made.pruned.quality)} after"
            )
    parts = [*_rounding_parts(recipe), *_activation_parts(recipe), f"{made.bits:.2f} bits a weight"]
    levels = {8: made.wide, 16: made.half}
    parts += [f"{len(names)} matrices of {bits}" for bits, names in levels.items() if names]
    parts += learned if recipe.method != "nearest" or recipe.bits is not None else ()
    yield _line("recipe", ", ".join(parts))
    if made.quality:
        quality = made.quality
        yield _line(
            "quality",
            f"{_figures(quality)}, perplexity {quality['perplexity']:.3f} for {quality['reference_perplexity']:.3f} of "
            f"the source, on {made.evaluated:,} tokens, activations not rounded",
        )


def _line(name: str, text: str) -> str:
    return f"{name:12}  {text}"


def _figures(quality: Mapping[str, float]) -> str:
    return f"KL {quality['kl']:.5f}, top-1 {quality['top1']:.2%}"


def _rounding_parts(recipe: Recipe) -> Iterator[str]:
    if not recipe.rounds:
        yield "rounded as the weights' format says"
        return
    yield recipe.method
    yield f"groups of {recipe.group}"
    if recipe.symmetric:
        yield "symmetric"
    yield f"embedding {recipe.embedding_bits}"


def _activation_parts(recipe: Recipe) -> Iterator[str]:
    if recipe.activation_bits != PLAIN.activation_bits:
        yield f"activations of {recipe.activation_bits} bits"


def _pruned_parts(wish: Prune, pruned: Pruned) -> Iterator[str]:
    if wish.target is not None:
        yield f"to {wish.target} {wish.to:g}"
    if pruned.layers:
        yield f"without layers {', '.join(map(str, pruned.layers))}"
    if pruned.ranking is not None:
        kept = [index for index in range(len(pruned.ranking.group_loss)) if index not in pruned.layers]
        groups = sum(len(pruned.ranking.group_loss[index]) for index in kept)
        yield f"{sum(pruned.kv_heads)} of {groups} KV groups"
        yield f"{min(pruned.neurons)} to {max(pruned.neurons)} neurons a layer"
    if pruned.vocabulary is not None:
        yield f"{pruned.vocabulary:,} tokens"
