"""From a checkpoint to a model package: one graph per engine, whole or absent."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from edge_runtime.errors import ConfigError, CorruptModel, StorageError
from edge_runtime.package import ArchitectureSummary, Manifest, Weights, storage_errors
from edge_runtime.package_writer import PackageContents, PackageWriter, write_package
from edge_runtime.recipe import PLAIN, Compression, Recipe
from edge_runtime.tokenizer_json import open_tokenizer
from exporters.architecture import Architecture
from exporters.builder import Levels
from exporters.checkpoint import Checkpoint, TextFiles
from exporters.compression.budget import NARROW
from exporters.compression.compress import LEVELS
from exporters.compression.shrink import Shrinking, Shrunk
from exporters.graphs import Engine, matrix_levels, write_graph
from exporters.network import parameters
from exporters.npu_weights import GROUP, NpuCheckpoint
from exporters.quantize import QuantizedCheckpoint

Progress = Callable[[str, int, int], None]
"""``progress(variant, done, total)`` in layers."""


def export(
    source: Checkpoint,
    folder: Path,
    engines: Sequence[Engine] = ("onnx", "openvino"),
    weights: Weights = "int4",
    progress: Progress | None = None,
    *,
    name: str | None = None,
    provenance: Mapping[str, Any] | None = None,
    shrinking: Shrinking | None = None,
) -> None:
    """Write ``source`` as the package ``folder``, or add the variants that are missing to the package there.

    ``name`` is the package's (default: the folder's); ``provenance`` is put over the checkpoint's own. About one layer
    is in memory at a time. ``shrinking``: by a recipe, in place of what ``weights`` means by itself. Raises
    StorageError, UnsupportedModel, CorruptModel, ConfigError; ``folder`` is then as it was.
    """
    if shrinking is not None:
        _check_possible(shrinking.recipe, weights, engines)
        _check_heads(shrinking.recipe, source.architecture, engines)
    made_from = {**source.provenance, **(provenance or {})}
    with write_package(folder) as writer:
        if writer.existing is not None:
            _check_same(writer.existing.provenance, made_from, folder)
            _check_recipe(writer.existing, weights, shrinking, folder)
        names = {f"{engine}-{weights}": engine for engine in engines}
        missing = {variant: engine for variant, engine in names.items() if not writer.has_variant(variant)}
        if not missing:
            return
        _check_vocabulary(source)
        made, compression = source, None
        with ExitStack() as stack:
            shrunk = None
            if shrinking is not None:
                shrunk = stack.enter_context(_shrunk(source, shrinking, weights, writer.folder, progress))
            for levels, variants in _by_levels(missing, shrinking).items():
                if shrunk is not None:
                    made, compression = shrunk.rounded(levels)
                    if writer.existing is not None:
                        _check_network(writer.existing, made.architecture, compression, folder)
                for variant, engine in variants.items():
                    _write_variant(writer, made, variant, engine, weights, progress, compression)
        writer.commit(contents(name or folder.absolute().name, made_from, summarize(made.architecture), made.text))


def _by_levels(variants: Mapping[str, Engine], shrinking: Shrinking | None) -> Mapping[Levels, Mapping[str, Engine]]:
    """Those together that are rounded alike: where matrices differ in their bits, engines do in which they take."""
    mixed = shrinking is not None and shrinking.recipe.bits is not None
    found: dict[Levels, dict[str, Engine]] = {}
    for variant, engine in variants.items():
        found.setdefault(matrix_levels(engine) if mixed else LEVELS, {})[variant] = engine
    return found


def _write_variant(
    writer: PackageWriter,
    checkpoint: Checkpoint,
    variant: str,
    engine: Engine,
    weights: Weights,
    progress: Progress | None,
    compression: Compression | None,
) -> None:
    view = NpuCheckpoint if engine == "openvino-npu" else QuantizedCheckpoint
    report = None if progress is None else partial(progress, variant)
    target = writer.variant_folder(variant)
    activation_bits = PLAIN.activation_bits if compression is None else compression.recipe.activation_bits
    # Weight files grow on the package's disk, which needs the room anyway; a temporary folder may be in memory.
    scratch = writer.folder / "scratch"
    scratch.mkdir()
    try:
        runs_on, file = write_graph(
            view(checkpoint, weights), engine, weights, target, scratch, report, activation_bits
        )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    writer.add_variant(variant, runs_on, weights, file, compression)


@contextmanager
def _shrunk(
    source: Checkpoint, shrinking: Shrinking, weights: Weights, folder: Path, progress: Progress | None
) -> Iterator[Shrunk]:
    """``folder``: on whose disk the tensors lie meanwhile."""
    with storage_errors(f"cannot keep tensors in {folder}"), tempfile.TemporaryDirectory(dir=folder) as tensors:
        yield Shrunk(source, shrinking, weights, Path(tensors), progress)


def _check_possible(recipe: Recipe, weights: Weights, engines: Sequence[Engine]) -> None:
    if recipe.rounds and weights != "int4":
        raise ConfigError(f"how matrices are rounded is for int4 weights, not {weights}")
    if recipe.activation_bits != PLAIN.activation_bits and (weights != "int4" or set(engines) != {"onnx-edge"}):
        raise ConfigError(
            f"--activation-bits {recipe.activation_bits} is for int4 weights and our own kernels alone: "
            "add --engine onnx-edge, and leave --weights out"
        )
    for engine in engines:
        if recipe.rounds and NARROW not in matrix_levels(engine):
            raise ConfigError(f"how matrices are rounded is for int4 weights, which {engine} does not take")
    if (
        recipe.rounds
        and "openvino-npu" in engines
        and not (recipe.symmetric and recipe.group == GROUP and recipe.bits is None)
    ):
        raise ConfigError(
            f"NPUs take groups of {GROUP} without zero points, and no matrices of more bits in between: add "
            f"--group {GROUP} --symmetric, and leave --bits out"
        )


def _check_heads(recipe: Recipe, arch: Architecture, engines: Sequence[Engine]) -> None:
    """Before minutes are spent on what is to be cut."""
    wish = recipe.prune
    if "onnx-cuda" not in engines or wish is None or max(map(arch.kv_heads, range(arch.num_layers))) == 1:
        return
    if wish.heads or wish.target is not None:
        cuts = "" if wish.target is None else f", which {wish.target}= would cut, too"
        raise ConfigError(
            f"CUDA's KV cache has as many heads in every layer{cuts}: prune mlp= or layers= for onnx-cuda, and no heads"
        )


def _check_recipe(existing: Manifest, weights: Weights, shrinking: Shrinking | None, folder: Path) -> None:
    """Variants of one format are made alike, or nobody could tell which one is meant; all are of one network."""
    recipe = None if shrinking is None else shrinking.recipe
    prune = None if recipe is None else recipe.prune
    for variant in existing.variants:
        made = None if variant.compression is None else variant.compression.recipe
        pruned = None if made is None else made.prune
        if pruned != prune or (variant.weights == weights and made != recipe):
            raise StorageError(
                f"{folder} has {variant.name}, which was made by another recipe; choose another folder, or remove it"
            )


def _check_network(existing: Manifest, arch: Architecture, compression: Compression, folder: Path) -> None:
    """The same wish may cut otherwise by another text, or by times that were measured anew."""
    for variant in existing.variants:
        other = variant.compression
        if other is None or other.pruned is None or compression.pruned is None:
            continue
        same_cut = other.pruned.cut == compression.pruned.cut and other.calibration == compression.calibration
        if not same_cut or summarize(arch) != existing.architecture:
            raise StorageError(
                f"{folder} has {variant.name}, which was cut otherwise (by another text, or by latencies as they were "
                "then); export all variants at once, or choose another folder"
            )


def _check_same(existing: Mapping[str, Any], fresh: Mapping[str, Any], folder: Path) -> None:
    """A variant of another model must not slip into a package."""
    key = "sha256" if "sha256" in existing or "sha256" in fresh else "source"
    if existing.get(key) != fresh.get(key):
        raise StorageError(
            f"{folder} is a package of another model (its {key} is {existing.get(key)!r}, this one's is "
            f"{fresh.get(key)!r}); choose another folder or remove it"
        )


def _check_vocabulary(source: Checkpoint) -> None:
    """The tokenizer of another model must not slip in; a vocabulary larger than the tokenizer's is padding.

    Added tokens are let off: Gemma 3's text models share one, for images, with those that have an embedding for it.
    A prompt that holds such a token is refused when it comes.
    """
    tokenizer = open_tokenizer(source.text.tokenizer_json)
    ids = set(tokenizer.get_vocab(with_added_tokens=False).values()) - tokenizer.get_added_tokens_decoder().keys()
    highest, size = max(ids, default=-1), source.architecture.vocab_size
    if highest >= size:
        raise CorruptModel(
            f"the tokenizer makes ids up to {highest}, but the model's vocabulary has {size} tokens; "
            "put the tokenizer beside the weights that they were trained with"
        )


def contents(
    name: str, provenance: dict[str, Any], architecture: ArchitectureSummary, text: TextFiles
) -> PackageContents:
    """What a package says beside its variants."""
    return PackageContents(
        name=name,
        provenance=provenance,
        architecture=architecture,
        tokenizer_json=text.tokenizer_json,
        chat_template=text.chat_template,
        special_tokens=text.special_tokens,
        add_bos=text.add_bos,
        eos_ids=eos_ids(text),
        generation=text.generation,
    )


def summarize(arch: Architecture) -> ArchitectureSummary:
    windows = tuple(layer.sliding_window for layer in arch.layers)
    kv_heads = tuple(arch.kv_heads(index) for index in range(arch.num_layers))
    return ArchitectureSummary(
        family=arch.family,
        parameters=parameters(arch),
        num_layers=arch.num_layers,
        num_heads=arch.num_heads,
        num_kv_heads=arch.num_kv_heads,
        head_dim=arch.head_dim,
        hidden_size=arch.hidden_size,
        vocab_size=arch.vocab_size,
        max_context=arch.max_context,
        sliding_windows=windows if any(windows) else (),
        kv_heads=() if len({arch.num_kv_heads, *kv_heads}) == 1 else kv_heads,
        rope_switch=arch.rope_switch,
        tied_head=arch.tied_head,
    )


def eos_ids(text: TextFiles) -> tuple[int, ...]:
    """Tokens that end an answer: of the generation defaults, else the special token; some base models have none."""
    given = text.generation.get("eos_token_id")
    if given is None:
        name = text.special_tokens.get("eos_token")
        found = None if name is None else open_tokenizer(text.tokenizer_json).token_to_id(name)
        return () if found is None else (found,)
    ids = given if isinstance(given, list) else [given]
    if not all(isinstance(token, int) for token in ids):
        raise CorruptModel(f"eos_token_id must be an integer or a list of them, not {given!r}")
    return tuple(ids)
