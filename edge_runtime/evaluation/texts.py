"""Texts to evaluate and calibrate by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path

from edge_runtime.bench.workload import bundled_text
from edge_runtime.errors import ConfigError


def evaluation_texts() -> Mapping[str, str]:
    """Those that come along (edge_runtime/texts/README.md), by name."""
    return {
        "declaration": _bundled("declaration.txt"),
        "encyclopaedia": _bundled("encyclopaedia.txt"),
        "story": bundled_text(),
    }


def calibration_text() -> str:
    return _bundled("calibration.txt")


def read_texts(files: Sequence[Path]) -> Mapping[str, str]:
    """By their names, or their paths where two are called the same. ConfigError if one cannot be read or is empty."""
    names = [file.stem for file in files]
    labels = [str(file) if names.count(file.stem) > 1 else file.stem for file in files]
    return {label: read_text(file) for label, file in zip(labels, files, strict=True)}


def read_text(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the text {file}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"cannot read the text {file}: {error}") from error
    if not text.strip():
        raise ConfigError(f"the text {file} is empty")
    return text


def _bundled(name: str) -> str:
    return resources.files("edge_runtime.texts").joinpath(name).read_text(encoding="utf-8")
