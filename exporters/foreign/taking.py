"""A package around a graph that is made already, byte by byte."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from devices.base import Engine
from edge_runtime.disk import why
from edge_runtime.errors import StorageError, UnsupportedModel
from edge_runtime.package import ArchitectureSummary, Weights
from edge_runtime.package_writer import write_package
from exporters.checkpoint import TextFiles
from exporters.export import contents


@dataclass(frozen=True)
class ForeignModel:
    """What a folder has."""

    format: str
    """Who wrote it, for the provenance."""
    variant: str
    engine: Engine
    weights: Weights
    files: Sequence[Path]
    """That the variant is made of, the graph first."""
    architecture: ArchitectureSummary
    text: TextFiles


def take(model: ForeignModel, source: Path, target: Path, *, name: str, provenance: Mapping[str, Any]) -> None:
    """Make a package in ``target``. UnsupportedModel if there is one, since such a graph has no second variant;
    StorageError."""
    hashes = {file.name: _sha256(file) for file in model.files}
    with write_package(target) as writer:
        if writer.existing is not None:
            has = ", ".join(variant.name for variant in writer.existing.variants)
            raise UnsupportedModel(
                f"{source} has a graph that is made already, for one engine and with the weights it has ({has}): leave "
                "device and weights out, or give the checkpoint it was made of"
            )
        place = writer.variant_folder(model.variant)
        for file in model.files:
            try:
                shutil.copyfile(file, place / file.name)
            except OSError as error:
                raise StorageError(f"cannot copy {file}: {why(error)}") from error
        writer.add_variant(model.variant, model.engine, model.weights, model.files[0].name)
        told = {"source": str(source), "format": model.format, "sha256": hashes, **provenance}
        writer.commit(contents(name, told, model.architecture, model.text))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
