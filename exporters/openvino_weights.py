"""Weights of an OpenVINO model: written straight to the ``.bin``, decompressed by the graph.

A weight never becomes an OpenVINO constant while exporting, because constants stay in memory until the model is
serialized. The graph holds a Parameter of the same type and shape in its place; :meth:`WeightFile.finish` turns
those into ``Const`` layers of the IR (https://docs.openvino.ai, "OpenVINO IR format": a layer of type ``Const``
names the offset and size of its data in the ``.bin``).
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from xml.etree import ElementTree  # nosec B405  # reads what OpenVINO has just written, no model's

import numpy as np
from numpy.typing import NDArray

from devices.openvino_import import import_openvino
from edge_runtime.disk import UNCLEAR, why
from edge_runtime.errors import StorageError, UnsupportedModel
from exporters.weights import QuantizedTensor

ov = import_openvino()
ops = __import__("openvino.opset13", fromlist=["opset13"])

View = Callable[[], Any]
"""Adds the operators that turn a stored matrix into float32 (rows, cols), and returns the last.

Each reader has operators of its own, as the NPU plugin cuts the graph between the embedding and a tied head."""

ALIGNMENT = 64
"""Bytes; lets a memory-mapped file feed vector loads."""


@dataclass(frozen=True)
class _Stored:
    offset: int
    size: int


class WeightFile:
    """The growing ``.bin``, and the placeholders that stand for its pieces in the graph."""

    def __init__(self, scratch: Path | None) -> None:
        self._place = tempfile.gettempdir() if scratch is None else str(scratch)
        # without a name, so that nothing is left whatever ends the process
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115 - lives as long as self
        self._stored: dict[str, _Stored] = {}
        self.placeholders: list[Any] = []

    def add(self, values: NDArray[np.generic], element_type: str, shape: tuple[int, ...]) -> Any:
        """Write ``values`` (4-bit types already packed, low nibble first) and return the node that stands for them."""
        node = ops.parameter(list(shape), getattr(ov.Type, element_type))
        node.set_friendly_name(f"weight_{len(self.placeholders)}")
        offset = self._append(np.ascontiguousarray(values).data.cast("B"))
        self._stored[node.get_friendly_name()] = _Stored(offset, values.nbytes)
        self.placeholders.append(node)
        return node

    def _append(self, data: bytes | memoryview) -> int:
        try:
            self._file.write(b"\0" * (-self._file.tell() % ALIGNMENT))
            offset = self._file.tell()
            self._file.write(data)
        except OSError as error:
            raise StorageError(f"cannot write {len(data)} bytes of weights in {self._place}: {why(error)}") from error
        return offset

    def finish(self, model: Any, folder: Path) -> None:
        """Write ``openvino_model.xml`` and ``.bin`` into ``folder``. ``model`` has the placeholders as parameters."""
        xml, weights = folder / "openvino_model.xml", folder / "openvino_model.bin"
        try:
            ov.serialize(model, str(xml), str(weights))  # the .bin: only the graph's own small constants
            base = self._append(weights.read_bytes())
            self._patch(xml, base)
            self._file.flush()
            self._file.seek(0)
            with weights.open("wb") as target:
                shutil.copyfileobj(self._file, target, 1 << 20)
        except (OSError, RuntimeError) as error:  # OpenVINO's serializer raises the latter
            trouble = why(error) if isinstance(error, OSError) else f"{error}; {UNCLEAR}"
            raise StorageError(f"cannot write the OpenVINO model to {folder}: {trouble}") from error
        finally:
            self._file.close()

    def _patch(self, xml: Path, base: int) -> None:
        tree = ElementTree.parse(xml)  # nosec B314  # as above
        for layer in tree.iter("layer"):
            data = layer.find("data")
            if data is None:
                continue
            stored = self._stored.get(layer.get("name", ""))
            if stored is not None:
                layer.set("type", "Const")
                data.set("offset", str(stored.offset))
                data.set("size", str(stored.size))
                for port in layer.iter("port"):
                    port.attrib.pop("names", None)
            elif layer.get("type") == "Const":
                data.set("offset", str(int(data.get("offset", "0")) + base))
        tree.write(xml, encoding="utf-8", xml_declaration=True)


def float_matrix(store: WeightFile, values: NDArray[np.float32], half: bool) -> View:
    """``values``, stored in half precision if asked for."""
    if not half:
        node = store.add(np.asarray(values, np.float32), "f32", values.shape)
        return lambda: node
    node = store.add(to_half(values), "f16", values.shape)
    return lambda: ops.convert(node, "f32")


def to_half(values: NDArray[np.float32]) -> NDArray[np.float16]:
    """UnsupportedModel when a value does not fit float16."""
    largest = float(np.max(np.abs(values), initial=0.0))
    if not largest <= float(np.finfo(np.float16).max):
        raise UnsupportedModel(f"a weight of magnitude {largest:g} does not fit float16 (65504); export as fp32")
    return values.astype(np.float16)


def compressed_matrix(store: WeightFile, tensor: QuantizedTensor, exact: bool = False) -> View:
    """``tensor`` in a form that OpenVINO's plugins keep compressed and decompress inside the product.

    ``Constant → Convert → [Subtract] → Multiply → Reshape → Convert``. Zero points are rounded to integers (see
    :func:`offset_matrix` for the rest) and the activations may be quantized to int8 on the way; signed types where
    every zero point is the middle. ``exact`` keeps fractional zero points and, their constant being float16, the
    activations too.
    """
    rows, cols = tensor.shape
    groups = cols // tensor.group
    codes, middle = tensor.codes, 2 ** (tensor.bits - 1)
    zero = tensor.zero if exact else tensor.split_zero()[0].astype(np.float32)
    central = bool(np.all(zero == middle))
    signed = central and not exact
    if signed:
        codes = codes ^ np.uint8(middle)  # two's complement of code − middle, within its bits
    name = f"{'i' if signed else 'u'}{tensor.bits}"
    stored = store.add(_pack(codes, tensor.bits), name, (rows, groups, tensor.group))
    scale = store.add(to_half(tensor.scale), "f16", (rows, groups, 1))
    if central:
        zeros = ops.constant(np.full((1, 1, 1), middle, np.float16))
    elif exact:
        zeros = store.add(to_half(zero), "f16", (rows, groups, 1))
    else:
        zeros = store.add(_pack(zero.astype(np.uint8), tensor.bits), f"u{tensor.bits}", (rows, groups, 1))

    def view() -> Any:
        value = ops.convert(stored, "f16")
        if not signed:
            value = ops.subtract(value, zeros if central or exact else ops.convert(zeros, "f16"))
        target = ops.constant(np.array([rows, cols], np.int64))
        return ops.convert(ops.reshape(ops.multiply(value, scale), target, False), "f32")

    return view


def symmetric_matrix(store: WeightFile, tensor: QuantizedTensor) -> View:
    """``tensor``, whose zero points are all in the middle, as signed integers in the forms that the NPU plugin knows.

    ``Constant → Convert → Multiply → [Reshape] → Convert``: of groups the product is joined, of whole rows it is not.
    """
    rows, cols = tensor.shape
    groups = cols // tensor.group
    shape: tuple[int, ...] = (rows, cols) if groups == 1 else (rows, groups, tensor.group)
    codes = tensor.codes ^ np.uint8(2 ** (tensor.bits - 1))  # two's complement of code − middle, within its bits
    stored = store.add(_pack(codes, tensor.bits), f"i{tensor.bits}", shape)
    scale = store.add(to_half(tensor.scale), "f16", (*shape[:-1], 1))

    def view() -> Any:
        value = ops.multiply(ops.convert(stored, "f16"), scale)
        if groups > 1:
            value = ops.reshape(value, ops.constant(np.array([rows, cols], np.int64)), False)
        return ops.convert(value, "f32")

    return view


def _pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    if bits == 8:
        return codes
    flat = codes.reshape(-1) & np.uint8(0xF)
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    return np.asarray(flat[0::2] | flat[1::2] << 4, np.uint8)


def offset_matrix(tensor: QuantizedTensor) -> QuantizedTensor | None:
    """What integer zero points leave over, as a matrix (rows, groups) for the sums of each group of the input.

    With ``value = scale · (code − integer) + offset[g]`` (:meth:`QuantizedTensor.split_zero`), ``x · value`` is
    ``x · scale·(code − integer) + Σ_g offset[g] · sum(x in g)``. The offsets are at most half a step of the weight and
    get 8 bits with a scale per row, which leaves 2**-8 of the error of rounding the zero point. None when
    every zero point is an integer already.
    """
    _, offset = tensor.split_zero()
    if not np.any(np.abs(offset) > 1e-3 * np.abs(tensor.scale)):
        return None
    scale = np.abs(offset).max(axis=1, keepdims=True) / 127
    scale = np.maximum(scale, np.float32(2**-24)).astype(np.float16).astype(np.float32)  # as it is stored
    codes = np.clip(np.rint(offset / scale) + 128, 0, 255).astype(np.uint8)
    return QuantizedTensor(codes, scale, np.full_like(scale, 128), 8)
