"""Tensors on the disk, so that those of a whole model need not be in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edge_runtime.disk import why
from edge_runtime.errors import StorageError
from exporters.checkpoint import Checkpoint, CheckpointView
from exporters.weights import QuantizedTensor, Tensor


class TensorFolder:
    """In an existing folder of its own. StorageError where the disk fails."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __contains__(self, name: str) -> bool:
        return self._file(name).exists()

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        try:
            with self._file(name).open("wb") as file:
                if isinstance(tensor, QuantizedTensor):
                    bits = np.array(tensor.bits)
                    np.savez(file, codes=tensor.codes, scale=tensor.scale, zero=tensor.zero, bits=bits)
                else:
                    np.savez(file, values=tensor)
        except OSError as error:
            raise StorageError(f"cannot keep {name} in {self._folder}: {why(error)}") from error

    def __getitem__(self, name: str) -> Tensor:
        try:
            with np.load(self._file(name)) as arrays:
                if "values" in arrays:
                    values: Tensor = arrays["values"]
                    return values
                return QuantizedTensor(arrays["codes"], arrays["scale"], arrays["zero"], int(arrays["bits"]))
        except OSError as error:
            raise StorageError(f"cannot read {name} back from {self._folder}: {why(error)}") from error

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.npz"


class ReplacedCheckpoint(CheckpointView):
    """``base`` with those tensors replaced that are in ``folder``."""

    def __init__(self, base: Checkpoint, folder: TensorFolder) -> None:
        super().__init__(base)
        self._folder = folder

    def tensor(self, name: str) -> Tensor:
        return self._folder[name] if name in self._folder else self._base.tensor(name)
