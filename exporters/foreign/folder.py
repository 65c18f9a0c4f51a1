"""Whose folder it is, of those whose graph is made already."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from exporters.foreign.genai_folder import adopt_genai, is_genai_folder
from exporters.foreign.openvino_folder import adopt_openvino, is_openvino_folder


class Adopt(Protocol):
    """Makes a package in ``target`` with the graph of ``folder``."""

    def __call__(self, folder: Path, target: Path, *, name: str, provenance: dict[str, Any]) -> None: ...


def adopter(path: object) -> Adopt | None:
    """None for anything that is exported here."""
    if not isinstance(path, Path):
        return None
    if is_openvino_folder(path):
        return adopt_openvino
    return adopt_genai if is_genai_folder(path) else None
