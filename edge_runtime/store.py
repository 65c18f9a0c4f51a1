"""The models on this machine: pull them, list them, find them, remove them."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from devices.base import Engine
from edge_runtime.errors import EdgeError, ModelNotFound, UnknownReference
from edge_runtime.exporting import ENCODER_ENGINES, Outline, Progress, export_fetched, fetch, outline_fetched
from edge_runtime.leftovers import remove_leftovers
from edge_runtime.locks import file_lock
from edge_runtime.package import Package, Variant, Weights, is_package, storage_errors
from edge_runtime.package_writer import write_package
from edge_runtime.paths import Home
from edge_runtime.references import (
    CatalogueReference,
    HubReference,
    PackageReference,
    PathReference,
    PypiReference,
    Reference,
    SyntheticReference,
    parse_foreign,
    parse_reference,
    slug,
)

_WEIGHT_PREFERENCE: tuple[Weights, ...] = ("int4", "int8", "fp16", "fp32")


@dataclass(frozen=True)
class StoredModel:
    """An entry of the store."""

    folder: Path
    package: Package | None
    name: str
    """What finds it here, and nothing else: its own name, or its folder's where that is not its alone."""
    problem: str | None = None
    """Why it cannot be opened."""


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
        remove_leftovers(self.home.models)
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
        """A model that is here, by its folder's name, its reference or its own name. ModelNotFound, also of a name that
        several have; CorruptModel; UnknownReference if it is no reference either."""
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
        return outline_fetched(fetch(parsed, Path(), None), weights)

    def list(self) -> list[StoredModel]:
        """Everything in the store, by folder name; also what cannot be opened."""
        if not self.home.models.is_dir():
            return []
        with storage_errors(f"cannot read {self.home.models}"):
            folders = [path for path in sorted(self.home.models.iterdir()) if is_package(path) and path.name[0] != "."]
        opened = [_open_entry(folder) for folder in folders]
        names = Counter(name for entry in opened for name in {entry.folder.name, entry.name})
        return [entry if _is_its_own(entry, names) else replace(entry, name=entry.folder.name) for entry in opened]

    def remove(self, reference: str) -> Path:
        """Delete a model of the store; returns its folder. ModelNotFound; StorageError. Only the store's own. What is
        left of one whose removal was killed goes too, though it is not found any more."""
        remove_leftovers(self.home.models)
        folder = self._folder_of(reference)
        if folder.parent != self.home.models:
            raise ModelNotFound(f"{folder} is not in the store ({self.home.models}); delete it yourself")
        with file_lock(_lock(folder)), storage_errors(f"cannot remove {folder}"):
            # Renamed first: at no time is there half a model under its name.
            doomed = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
            folder.rename(doomed / "model")
            shutil.rmtree(doomed)
        remove_leftovers(folder.parent)
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
        """Names come last: packages give them to themselves."""
        entries = self.list()
        for entry in entries:
            if reference == entry.folder.name:
                return entry.folder
        unknown: UnknownReference | None = None
        try:
            parsed = parse_reference(reference)
        except UnknownReference as error:
            unknown = error
        else:
            folder = parsed.path if isinstance(parsed, PackageReference) else self.home.models / slug(parsed)
            if is_package(folder):
                return folder
        for entry in entries:
            if reference == entry.name:
                return entry.folder
        alike = [entry.folder.name for entry in entries if entry.package and entry.package.name == reference]
        if alike:
            raise ModelNotFound(
                f"{reference} is not on this machine by that reference, but what calls itself so: name its folder, "
                f"{' or '.join(alike)}"
            )
        if unknown is not None:
            raise unknown
        here = ", ".join(entry.name for entry in entries) or "none"
        raise ModelNotFound(f"{reference} is not on this machine (here: {here}); get it with edge-glm pull")

    def _pull(
        self, reference: Reference, engine: Engine, weights: Weights | None, progress: Progress | None
    ) -> Package:
        folder = self.home.models / slug(reference)
        with storage_errors(f"cannot make {self.home.models}"):
            self.home.models.mkdir(parents=True, exist_ok=True)
        # Not the writer's own lock: this one also keeps a second process from downloading the same.
        with (
            file_lock(folder.parent / f".{folder.name}.pull.lock"),
            storage_errors(f"cannot store {reference} in {folder}"),
        ):
            present = Package.open(folder) if is_package(folder) else None
            if present is not None and pick_variant(present, engine, weights) is not None:
                return present  # another process was faster
            workdir = Path(tempfile.mkdtemp(prefix=f".{folder.name}.fetch-", dir=folder.parent))
            try:
                fetched = fetch(_pinned(reference, present), workdir, progress)
                if isinstance(fetched.path, Path) and is_package(fetched.path):
                    if present is None:
                        with write_package(folder) as writer:
                            writer.adopt(Package.open(fetched.path))
                else:
                    export_fetched(fetched, folder, [engine], weights, progress, name=_display_name(reference))
            finally:
                shutil.rmtree(workdir, ignore_errors=True)
        return Package.open(folder)


def pick_variant(package: Package, engine: Engine, weights: Weights | None) -> Variant | None:
    """The variant for ``engine``; without ``weights``, the smallest format there is."""
    formats = _WEIGHT_PREFERENCE if weights is None else (weights,)
    return next((found for each in formats if (found := package.variant(engine, each)) is not None), None)


def _pinned(reference: Reference, present: Package | None) -> Reference:
    """For a further variant: the very version that the package was made from, if that can be had anywhere."""
    recorded = None if present is None else present.manifest.provenance.get("source")
    if not isinstance(recorded, str) or not isinstance(reference, CatalogueReference | PypiReference | HubReference):
        return reference
    target = reference.target if isinstance(reference, CatalogueReference) else reference
    source = parse_foreign(recorded)
    if not isinstance(source, PypiReference | HubReference):
        return reference
    if isinstance(source, HubReference) and isinstance(target, HubReference):
        return HubReference(source.repo, source.revision, target.file)
    return source


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
    """By its own name."""
    try:
        package = Package.open(folder)
    except EdgeError as error:
        return StoredModel(folder, None, folder.name, str(error))
    return StoredModel(folder, package, package.name)


def _is_its_own(entry: StoredModel, names: Counter[str]) -> bool:
    """Whether its name is its reference; of another name, whether it is no other's by all ``names`` of models and
    folders."""
    parsed = parse_foreign(entry.name)
    return names[entry.name] == 1 if parsed is None else slug(parsed) == entry.folder.name


def _key(folder: Path) -> str:
    """A name for what is kept about the package there."""
    return hashlib.sha256(str(folder).encode("utf-8", "surrogateescape")).hexdigest()


def _lock(folder: Path) -> Path:
    """The lock under which :func:`write_package` works."""
    return folder.parent / f".{folder.name}.lock"
