"""The structure of a GGUF file: metadata and where each tensor's bytes lie, checked before anything is believed.

The format is ggml's ``docs/gguf.md``. The ``gguf`` package's ``GGUFReader`` reads the same, but makes an object per
array element (2.4 s for a vocabulary of 49,152 against 0.1 s here) and, given a wrong count, walks past the end of
the file for as long as the count says. Its tables of types and block sizes are used here, and a test holds this
reader to the same answers.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType
from numpy.typing import NDArray

from edge_runtime.errors import CorruptModel, ModelNotFound, StorageError, UnsupportedModel
from exporters.gguf_blocks import row_bytes

VERSIONS = (2, 3)
MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
MAX_KEY_BYTES = 65535  # docs/gguf.md; also bounds what a tensor's name can be

_SCALARS: Mapping[GGUFValueType, str] = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of the file."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    """Slowest axis first, so a matrix is (rows, columns); the file has them the other way round."""
    offset: int
    """Of the first byte, from the start of the file."""
    row_bytes: int

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes


@dataclass(frozen=True)
class GgufFile:
    """An opened file. The bytes of tensors are mapped, not read."""

    path: Path
    metadata: Mapping[str, Any]
    """Scalars as int, float, bool or str; arrays of strings as lists, other arrays as numpy arrays."""
    tensors: Mapping[str, TensorInfo]
    data: NDArray[np.uint8]

    def rows(self, info: TensorInfo, start: int, stop: int) -> NDArray[np.uint8]:
        """(stop − start, row_bytes): the raw bytes of some rows, a view into the mapped file."""
        first = info.offset + start * info.row_bytes
        return self.data[first : info.offset + stop * info.row_bytes].reshape(-1, info.row_bytes)


def open_gguf(path: Path) -> GgufFile:
    """Map ``path`` and read its structure.

    Raises ModelNotFound or StorageError if it cannot be opened, CorruptModel if anything in it contradicts itself or
    lies outside the file, UnsupportedModel for a version, byte order or tensor type that is not read.
    """
    try:
        size = path.stat().st_size
        if size < 24:  # magic, version and the two counts
            raise CorruptModel(f"{path.name} is no GGUF file: it has {size} bytes, a header alone has 24")
        data = np.memmap(path, np.uint8, mode="r")
    except FileNotFoundError as error:
        raise ModelNotFound(f"{path} does not exist") from error
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error}") from error
    reader = _Reader(data, path.name)
    try:
        metadata, infos = reader.read()
    except UnicodeDecodeError as error:
        raise CorruptModel(f"{path.name}: a string of the header is not UTF-8 ({error.reason})") from error
    return GgufFile(path, metadata, infos, data)


class _Reader:
    """A cursor over the header. Nothing is allocated for a count before the file is known to be long enough."""

    def __init__(self, data: NDArray[np.uint8], name: str) -> None:
        self._bytes = data.data
        self._name = name
        self._at = 0

    def read(self) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
        tensors, fields = self._header()
        metadata: dict[str, Any] = {}
        self._need(fields * 13, f"{fields} metadata fields")  # an empty key, a type and one byte
        for _ in range(fields):
            key = self._text(MAX_KEY_BYTES)
            if key in metadata:
                raise self._corrupt(f"metadata field {key!r} appears twice")
            metadata[key] = self._value(key)
        self._need(tensors * 32, f"{tensors} tensors")  # an empty name, one dimension, a type and an offset
        entries = [self._tensor() for _ in range(tensors)]
        return metadata, self._place(entries, self._alignment(metadata))

    def _header(self) -> tuple[int, int]:
        magic = bytes(self._bytes[:4])
        if magic != b"GGUF":
            raise self._corrupt(f"it starts with {magic!r}, not b'GGUF'")
        self._at = 4
        version = self._unpack("<I")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            what = "big-endian" if swapped in VERSIONS else f"version {version}"
            raise UnsupportedModel(f"{self._name} is a {what} GGUF file; little-endian version 2 and 3 are read")
        return self._unpack("<Q"), self._unpack("<Q")

    def _alignment(self, metadata: Mapping[str, Any]) -> int:
        value = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
        if not isinstance(value, int) or not 0 < value <= 1 << 20 or value & (value - 1):
            raise self._corrupt(f"general.alignment is {value!r}, not a power of two")
        return value

    def _value(self, key: str) -> Any:
        kind = self._type(key)
        if kind == GGUFValueType.STRING:
            return self._text()
        if kind != GGUFValueType.ARRAY:
            return self._array(_SCALARS[kind], 1, key)[0].item()
        item, count = self._type(key), self._unpack("<Q")
        if item == GGUFValueType.STRING:
            self._need(count * 8, f"the {count} strings of {key!r}")
            return [self._text() for _ in range(count)]
        if item == GGUFValueType.ARRAY:
            raise UnsupportedModel(f"{self._name}: metadata field {key!r} is an array of arrays, which is not read")
        return self._array(_SCALARS[item], count, key)

    def _type(self, key: str) -> GGUFValueType:
        number = self._unpack("<I")
        try:
            return GGUFValueType(number)
        except ValueError as error:
            raise self._corrupt(f"metadata field {key!r} has the unknown type {number}") from error

    def _tensor(self) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int]:
        name = self._text(MAX_KEY_BYTES)
        dimensions = self._unpack("<I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise self._corrupt(f"tensor {name!r} has {dimensions} dimensions; 1 to {MAX_DIMENSIONS} are possible")
        shape = tuple(self._unpack("<Q") for _ in range(dimensions))[::-1]
        if 0 in shape:
            raise self._corrupt(f"tensor {name!r} has the empty shape {shape}")
        number = self._unpack("<I")
        try:
            kind = GGMLQuantizationType(number)
        except ValueError as error:
            raise UnsupportedModel(f"{self._name}: tensor {name!r} has the unknown type {number}") from error
        return name, kind, shape, self._unpack("<Q")

    def _place(
        self, entries: list[tuple[str, GGMLQuantizationType, tuple[int, ...], int]], alignment: int
    ) -> dict[str, TensorInfo]:
        """Tensors with their place in the file, each inside it and none over another."""
        start = -(-self._at // alignment) * alignment
        infos: dict[str, TensorInfo] = {}
        for name, kind, shape, offset in entries:
            if name in infos:
                raise self._corrupt(f"tensor {name!r} appears twice")
            info = TensorInfo(name, kind, shape, start + offset, row_bytes(shape[-1], kind, name))
            if info.offset + info.nbytes > len(self._bytes):
                raise self._corrupt(
                    f"tensor {name!r} would end at byte {info.offset + info.nbytes:,}, the file has "
                    f"{len(self._bytes):,}. It was probably cut short: fetch it again"
                )
            infos[name] = info
        end, before = start, ""
        for info in sorted(infos.values(), key=lambda info: info.offset):
            if info.offset < end or info.offset % alignment:
                raise self._corrupt(f"tensor {info.name!r} at byte {info.offset:,} is misplaced or overlaps {before!r}")
            end, before = info.offset + info.nbytes, info.name
        return infos

    def _text(self, limit: int | None = None) -> str:
        length = self._unpack("<Q")
        if limit is not None and length > limit:
            raise self._corrupt(f"a name of {length} bytes at byte {self._at:,}; {limit} are possible")
        self._need(length, f"a string of {length} bytes")
        self._at += length
        return str(self._bytes[self._at - length : self._at], "utf-8")

    def _array(self, dtype: str, count: int, key: str) -> NDArray[Any]:
        size = np.dtype(dtype).itemsize
        self._need(count * size, f"the {count} values of {key!r}")
        values: NDArray[Any] = np.frombuffer(self._bytes, dtype, count, self._at)
        self._at += count * size
        return values

    def _unpack(self, layout: str) -> int:
        self._need(struct.calcsize(layout), "the next number")
        value: int = struct.unpack_from(layout, self._bytes, self._at)[0]
        self._at += struct.calcsize(layout)
        return value

    def _need(self, count: int, what: str) -> None:
        if self._at + count > len(self._bytes):
            raise self._corrupt(
                f"the file ends within its header: {what} at byte {self._at:,} do not fit into {len(self._bytes):,} "
                "bytes. It was probably cut short: fetch it again"
            )

    def _corrupt(self, what: str) -> CorruptModel:
        return CorruptModel(f"{self._name} is damaged or no GGUF file: {what}")
