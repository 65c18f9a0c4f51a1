"""A folder as Transformers saves it: ``config.json``, one or several ``.safetensors`` files, a tokenizer."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy, which safetensors then returns
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from edge_runtime.errors import CorruptModel, ModelNotFound, UnsupportedModel
from exporters.architecture import Architecture
from exporters.checkpoint import TextFiles
from exporters.families import architecture
from exporters.hf_names import source, tensor_shape
from exporters.hf_text import read_json, read_text_files
from exporters.network import tensor_names

_DTYPES = ("F32", "F16", "BF16")
_UNUSED = re.compile(r"\.rotary_emb\.inv_freq$")
"""Buffers of older releases that repeat what the configuration says."""


class SafetensorsCheckpoint:
    """A :class:`~exporters.checkpoint.Checkpoint` over a local folder.

    Opening reads only the headers and checks them: every tensor of the architecture must be there with its
    shape and as F32, F16 or BF16, and no other tensor may be left over. Values are read when asked for.
    Raises ModelNotFound, CorruptModel or UnsupportedModel.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        if not (folder / "config.json").is_file():
            raise ModelNotFound(f"{folder} has no config.json; a folder saved by Transformers is needed")
        self._config = read_json(folder / "config.json")
        self._architecture = architecture(self._config)
        self._files = _open_files(folder)
        # a handle cannot be iterated, only its keys
        self._where = {name: file for file, handle in self._files.items() for name in handle.keys()}  # noqa: SIM118
        self._check_names()

    @property
    def architecture(self) -> Architecture:
        return self._architecture

    @cached_property
    def text(self) -> TextFiles:
        return read_text_files(self._folder, self._config)

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """Hashes every weight file on first use."""
        hashes = {name: _sha256(self._folder / name) for name in self._files}
        found: dict[str, Any] = {"source": str(self._folder), "format": "safetensors", "sha256": hashes}
        licence = _licence(self._folder / "README.md")
        return {**found, "licence": licence} if licence else found

    def tensor(self, name: str) -> NDArray[np.float32]:
        """(rows, cols) or (n,) float32, read from disk."""
        if name not in self._names:
            raise KeyError(name)
        origin = source(self._architecture, name)
        file = self._where[origin.name]
        try:
            stored = self._files[file].get_slice(origin.name)[origin.start : origin.stop]
        except (SafetensorError, OSError) as error:
            raise CorruptModel(f"{file}: tensor {origin.name} cannot be read: {error}") from error
        values = np.asarray(stored, np.float32)
        if not np.isfinite(values).all():
            raise CorruptModel(f"{file}: tensor {origin.name} holds values that are not finite")
        if origin.offset:
            values = values + np.float32(origin.offset)
        return np.ascontiguousarray(values)

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(tensor_names(self._architecture))

    def _check_names(self) -> None:
        arch = self._architecture
        wanted = {source(arch, name).name: source(arch, name).shape for name in self._names}
        for name, shape in wanted.items():
            if name not in self._where:
                raise CorruptModel(f"{self._folder}: tensor {name} is missing from the weight files")
            held = self._files[self._where[name]].get_slice(name)
            if tuple(held.get_shape()) != shape:
                raise CorruptModel(
                    f"{self._where[name]}: tensor {name} has shape {tuple(held.get_shape())}, "
                    f"but config.json makes it {shape}"
                )
            if held.get_dtype() not in _DTYPES:
                raise UnsupportedModel(
                    f"{self._where[name]}: tensor {name} is stored as {held.get_dtype()}; "
                    f"supported: {', '.join(_DTYPES)}"
                )
        extra = sorted(name for name in self._where if name not in wanted and not _UNUSED.search(name))
        if arch.tied_head and "lm_head.weight" in extra:
            extra.remove("lm_head.weight")
            self._check_tied("lm_head.weight")
        if extra:
            shown = ", ".join(extra[:5]) + (f" and {len(extra) - 5} more" if len(extra) > 5 else "")
            raise UnsupportedModel(
                f"{self._folder}: the weight files hold tensors that a {arch.family} model with this config.json "
                f"does not use: {shown}"
            )

    def _check_tied(self, head: str) -> None:
        """A head stored next to ``tie_word_embeddings`` must be the embedding, or one of the two is wrong."""
        embed = source(self._architecture, "embed").name
        one = self._files[self._where[head]].get_slice(head)
        two = self._files[self._where[embed]].get_slice(embed)
        shape = tensor_shape(self._architecture, "embed")
        same = tuple(one.get_shape()) == shape and one.get_dtype() == two.get_dtype()
        for start in range(0, shape[0] if same else 0, 4096):  # a few thousand rows bound the memory
            stop = min(start + 4096, shape[0])
            same = same and np.array_equal(one[start:stop], two[start:stop])
        if not same:
            raise CorruptModel(
                f"{self._folder}: config.json ties the head to the embedding (tie_word_embeddings), but {head} differs"
            )


def _open_files(folder: Path) -> dict[str, Any]:
    """File name → open handle; ``model.safetensors`` goes before an index, as in Transformers."""
    if (folder / "model.safetensors").is_file():
        return {"model.safetensors": _open(folder / "model.safetensors")}
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        raise ModelNotFound(f"{folder} has neither model.safetensors nor model.safetensors.index.json")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, Mapping) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CorruptModel(f"{index}: weight_map must map tensor names to file names")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or len(name.encode(errors="replace")) > 255:  # nor be longer than systems allow
            raise CorruptModel(f"{index}: {name!r} is not a plain file name")
        if not (folder / name).is_file():
            raise CorruptModel(f"{folder}: {name} is named by {index.name} but is not there")
    files = {name: _open(folder / name) for name in names}
    held = {name: set(handle.keys()) for name, handle in files.items()}
    for tensor, name in weight_map.items():
        if tensor not in held[name]:
            raise CorruptModel(f"{folder}: {index.name} says {tensor} is in {name}, but it is not")
    return files


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="np")
    except (SafetensorError, OSError) as error:
        raise CorruptModel(f"{path} is truncated or not a safetensors file: {error}") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _licence(readme: Path) -> str | None:
    """``license:`` of a model card's front matter."""
    if not readme.is_file():
        return None
    card = readme.read_text(encoding="utf-8", errors="replace")
    front = re.match(r"---\n(.*?)\n---", card, re.DOTALL)
    found = re.search(r"^license:\s*(\S+)\s*$", front.group(1), re.MULTILINE) if front else None
    return found.group(1) if found else None
