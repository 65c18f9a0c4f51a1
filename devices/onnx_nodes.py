"""The products in an ONNX file: which operators multiply by a matrix of weights, and how large it is.

ONNX Runtime's profile does not tell: it leaves out weights that were packed when the session was made, and attributes.
What is needed of the file is so little that it is read here, by protobuf's wire format
(https://protobuf.dev/programming-guides/encoding/) and the field numbers of ``onnx.proto``; weights outside the file
are not touched.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from devices.errors import EngineError
from devices.profiling import Product

_GRAPH = 7  # of ModelProto
_NODE, _INITIALIZER = 1, 5  # of GraphProto
_INPUT, _NAME, _OP_TYPE, _ATTRIBUTE = 1, 3, 4, 5  # of NodeProto
_ATTRIBUTE_NAME, _ATTRIBUTE_INT = 1, 3
_DIMS, _DATA_TYPE, _TENSOR_NAME = 1, 2, 8  # of TensorProto
_BITS = {1: 32, 2: 8, 3: 8, 5: 16, 6: 32, 7: 64, 10: 16, 11: 64, 16: 16, 21: 4, 22: 4}
"""By TensorProto.DataType."""
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_PLAIN = ("MatMul", "Gemm", "FusedMatMul")
_COUNTED = ("QuantizedMatMul", "MatMulNBits")
"""They say in attributes how large their matrix is, and of how many bits."""


def read_products(model: Path) -> dict[str, Product]:
    """By the name of the node. EngineError if ``model`` is no ONNX file."""
    try:
        data = memoryview(model.read_bytes())
        graph = next(value for field, value in _fields(data) if field == _GRAPH)
        return dict(_products(_view(graph)))
    except (OSError, ValueError, IndexError, StopIteration, TypeError) as error:
        raise EngineError(f"cannot read the operators of {model}: {error or type(error).__name__}") from error


def _products(graph: memoryview) -> Iterator[tuple[str, Product]]:
    parts = list(_fields(graph))
    weights = dict(_tensor(_view(value)) for field, value in parts if field == _INITIALIZER)
    for field, value in parts:
        if field != _NODE:
            continue
        inputs, name, kind, attributes = _node(_view(value))
        held = [weights[each] for each in inputs if each in weights]
        nbytes = sum(math.prod(dims) * bits // 8 for dims, bits in held)
        if kind in _COUNTED:
            yield name, Product(attributes["K"], attributes["N"], nbytes, integer=attributes.get("bits", 4) <= 8)
        elif kind in _PLAIN and len(inputs) > 1 and len(weights.get(inputs[1], ((), 0))[0]) == 2:
            dims, _ = weights[inputs[1]]
            inner, outputs = reversed(dims) if attributes.get("transB") else dims
            yield name, Product(inner, outputs, nbytes, integer=False)


def _node(data: memoryview) -> tuple[list[str], str, str, dict[str, int]]:
    """Inputs, name, type and whole-numbered attributes."""
    inputs, texts, attributes = [], {_NAME: "", _OP_TYPE: ""}, {}
    for field, value in _fields(data):
        if field == _INPUT:
            inputs.append(_text(value))
        elif field in texts:
            texts[field] = _text(value)
        elif field == _ATTRIBUTE:
            found = dict(_fields(_view(value)))
            number = found.get(_ATTRIBUTE_INT)
            if isinstance(number, int):
                attributes[_text(found[_ATTRIBUTE_NAME])] = number
    return inputs, texts[_NAME], texts[_OP_TYPE], attributes


def _tensor(data: memoryview) -> tuple[str, tuple[tuple[int, ...], int]]:
    """Its name, and (dimensions, bits of an element)."""
    name, kind, dims = "", 0, []
    for field, value in _fields(data):
        if field == _DIMS:
            dims += [value] if isinstance(value, int) else list(_varints(value))
        elif field == _DATA_TYPE and isinstance(value, int):
            kind = value
        elif field == _TENSOR_NAME:
            name = _text(value)
    return name, (tuple(dims), _BITS.get(kind, 0))


# ---- the wire format


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(number, value) of each field of a message, in order."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        value: int | memoryview
        if kind == _VARINT:
            value, at = _varint(data, at)
        else:
            if kind == _BYTES:
                size, at = _varint(data, at)
            elif kind in (_FIXED32, _FIXED64):
                size = 4 if kind == _FIXED32 else 8
            else:
                raise ValueError(f"a field of wire type {kind}")
            value = data[at : at + size]
            if len(value) < size:
                raise ValueError("it ends in the middle of a field")
            at += size
        yield key >> 3, value


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _varints(data: memoryview) -> Iterator[int]:
    at = 0
    while at < len(data):
        value, at = _varint(data, at)
        yield value


def _view(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise TypeError("a number where a message should be")
    return value


def _text(value: int | memoryview) -> str:
    return bytes(_view(value)).decode()
