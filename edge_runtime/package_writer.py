"""Write packages so that one is whole or absent, whatever happens in between.

Files are made in a hidden sibling folder under a lock, flushed to disk, and put in place by one rename. A variant
added to a package moves in first; the manifest that names it follows by one atomic replacement.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from devices.base import Engine
from edge_runtime.errors import ModelError, StorageError
from edge_runtime.locks import file_lock
from edge_runtime.package import (
    CHAT_TEMPLATE,
    GENERATION,
    MANIFEST,
    SCHEMA_VERSION,
    TOKENIZER,
    ArchitectureSummary,
    EncoderSummary,
    FileEntry,
    Manifest,
    Package,
    Variant,
    Weights,
    decode_manifest,
    file_entry,
    is_package,
    storage_errors,
)
from edge_runtime.recipe import Compression
from edge_runtime.version import version


@dataclass(frozen=True)
class PackageContents:
    """Everything of a package but its variants."""

    name: str
    provenance: dict[str, Any]
    architecture: ArchitectureSummary
    tokenizer_json: str
    chat_template: str | None
    special_tokens: dict[str, str]
    add_bos: bool
    eos_ids: tuple[int, ...]
    generation: dict[str, Any]
    encoder: EncoderSummary | None = None


@dataclass
class PackageWriter:
    """A package in the making; get one from :func:`write_package`."""

    target: Path
    folder: Path
    """The hidden folder; what is not there when the ``with`` block ends well is not in the package."""
    existing: Manifest | None
    """Of the package that variants are added to."""
    _variants: list[Variant] = field(default_factory=list)

    def has_variant(self, name: str) -> bool:
        return self.existing is not None and any(variant.name == name for variant in self.existing.variants)

    def variant_folder(self, name: str) -> Path:
        """A new empty folder for a variant's files."""
        path = self.folder / name
        path.mkdir()
        return path

    def add_variant(
        self, name: str, engine: Engine, weights: Weights, model: str, compression: Compression | None = None
    ) -> None:
        """Record the files of ``variant_folder(name)``, which are complete; ``model`` is the graph's file name."""
        root = self.folder / name
        files = tuple(file_entry(self.folder, path) for path in sorted(root.rglob("*")) if path.is_file())
        self._variants.append(Variant(name, engine, weights, f"{name}/{model}", files, compression))

    def commit(self, contents: PackageContents) -> None:
        """Put the package, or the added variants, in place. Last call of the block."""
        if self.existing is None:
            files = self._write_texts(contents)
            self._write_manifest(self.folder, _manifest(contents, files, tuple(self._variants)))
            _flush_tree(self.folder)
            self.folder.rename(self.target)  # an empty folder in the way is replaced; anything else refuses
            _flush(self.target.parent)
            return
        _flush_tree(self.folder)
        for variant in self._variants:
            place = self.target / variant.name
            if place.exists():  # left by a process that died before it wrote the manifest
                shutil.rmtree(place)
            (self.folder / variant.name).rename(place)
        variants = (*self.existing.variants, *self._variants)
        self._write_manifest(self.target, msgspec.structs.replace(self.existing, variants=variants))
        _flush(self.target)

    def adopt(self, package: Package) -> None:
        """Copy a whole package from elsewhere into place, after checking its hashes. Last call of the block."""
        package.verify()
        for path in (*(entry.path for entry in package.files()), MANIFEST):
            target = self.folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(package.folder / path, target)
        _flush_tree(self.folder)
        self.folder.rename(self.target)
        _flush(self.target.parent)

    def _write_texts(self, contents: PackageContents) -> tuple[FileEntry, ...]:
        texts = {TOKENIZER: contents.tokenizer_json}
        if contents.chat_template is not None:
            texts[CHAT_TEMPLATE] = contents.chat_template
        if contents.generation:
            texts[GENERATION] = msgspec.json.format(msgspec.json.encode(contents.generation)).decode()
        for name, text in texts.items():
            # bytes, so that no line ending is changed
            (self.folder / name).write_bytes(text.encode("utf-8"))
        return tuple(file_entry(self.folder, self.folder / name) for name in texts)

    def _write_manifest(self, folder: Path, manifest: Manifest) -> None:
        data = msgspec.json.format(msgspec.json.encode(manifest))
        decode_manifest(data, folder / MANIFEST)  # never write what could not be read again
        fresh = self.folder / f"{MANIFEST}.new"
        fresh.write_bytes(data)
        _flush(fresh)
        fresh.replace(folder / MANIFEST)


@contextmanager
def write_package(target: Path) -> Iterator[PackageWriter]:
    """Make a package at ``target``, or add variants to the one that is there.

    Waits while another process writes the same one. When the block fails, or ends without
    :meth:`PackageWriter.commit`, ``target`` is as it was. StorageError if the disk is full or not writable, or if
    something other than a package is in the way.
    """
    target = target.absolute()
    if not target.name:
        raise StorageError(f"cannot write a package at {target}")
    with file_lock(target.parent / f".{target.name}.lock"), storage_errors(f"cannot write the model package {target}"):
        _remove_stale(target)
        existing = Package.open(target).manifest if is_package(target) else None
        if existing is None and target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise StorageError(f"{target} exists and is not a model package; choose another folder or remove it")
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
        try:
            folder.chmod(0o755)  # mkdtemp makes it private; a model package is not
            yield PackageWriter(target, folder, existing)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _manifest(contents: PackageContents, files: tuple[FileEntry, ...], variants: tuple[Variant, ...]) -> Manifest:
    if not variants:
        raise ModelError(f"package {contents.name!r} has no variant")
    return Manifest(
        schema_version=SCHEMA_VERSION,
        created_by=f"edge-glm {version()}",
        name=contents.name,
        provenance=contents.provenance,
        architecture=contents.architecture,
        add_bos=contents.add_bos,
        special_tokens=contents.special_tokens,
        eos_ids=contents.eos_ids,
        files=files,
        variants=variants,
        encoder=contents.encoder,
    )


def _remove_stale(target: Path) -> None:
    """Delete what killed processes left behind; the lock is held, so nobody is at work in there."""
    for path in target.parent.iterdir():
        if path.name.startswith(f".{target.name}.partial-"):
            shutil.rmtree(path, ignore_errors=True)


def _flush_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        _flush(path)
    _flush(folder)


def _flush(path: Path) -> None:
    """Have the system write a file's or a folder's contents to the disk."""
    if sys.platform == "win32":  # folders cannot be opened there, and files only for writing
        if path.is_dir():
            return
        handle = os.open(path, os.O_RDWR)
    else:
        handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
