"""Open a model in whatever format it comes as a checkpoint."""

from __future__ import annotations

from pathlib import Path

from edge_runtime.errors import ModelNotFound, UnsupportedModel
from exporters.checkpoint import Checkpoint

SYNTHETIC = "synthetic:"


def open_checkpoint(source: Path | str) -> Checkpoint:
    """``source`` is a GGUF file, a safetensors folder, or ``synthetic:NAME``.

    Raises ModelNotFound, UnsupportedModel, CorruptModel, UnknownReference.
    """
    if isinstance(source, str) and source.startswith(SYNTHETIC):
        from exporters.synthetic import SyntheticCheckpoint

        return SyntheticCheckpoint(source.removeprefix(SYNTHETIC))
    path = Path(source)
    if path.is_dir():
        from exporters.safetensors_checkpoint import SafetensorsCheckpoint

        return SafetensorsCheckpoint(path)
    if not path.exists():
        raise ModelNotFound(f"there is no model at {path}")
    if path.suffix.lower() == ".gguf" or _magic(path) == b"GGUF":
        from exporters.gguf_checkpoint import GgufCheckpoint

        return GgufCheckpoint(path)
    raise UnsupportedModel(f"{path} is neither a GGUF file nor a safetensors folder")


def _magic(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(4)
    except OSError as error:
        raise ModelNotFound(f"cannot read {path}: {error.strerror or error}") from error
