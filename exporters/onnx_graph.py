"""An ONNX graph under construction: nodes in memory, weights straight to an external data file.

Only references stay in the proto, so building costs the memory of one tensor, whatever the model's size. ONNX
Runtime maps the file when the model is loaded by path; entries therefore start on page boundaries.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import tempfile
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from edge_runtime.disk import why
from edge_runtime.errors import StorageError

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
ALIGNMENT = 4096
"""Bytes. Pages of x86; on machines with larger pages ONNX Runtime maps from the page below."""
INLINE_LIMIT = 1024
"""Bytes up to which a constant lives in the proto: shape inference wants to see axes and shapes."""
OPSET = 21
MICROSOFT = "com.microsoft"
EDGE = "edge_glm"
"""Operators of our own, in ``kernels/``."""

Dims = Sequence[int | str]


class OnnxGraph:
    """Nodes, inputs, outputs and constants of one graph."""

    def __init__(self, name: str, scratch: Path | None = None, opset: int = OPSET) -> None:
        """``scratch``: folder for the data file until :meth:`save`; on the target's file system the file is
        only renamed. None: the system's temporary folder. ``opset``: version of the standard operators.
        StorageError if it cannot be written."""
        self._name = name
        self._opset = opset
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._constants: list[onnx.TensorProto] = []
        self._small: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._count = 0
        self._offset = 0
        try:
            self._scratch = Path(tempfile.mkdtemp(prefix=".onnx-", dir=scratch))
            self._data: IO[bytes] = (self._scratch / DATA_FILE).open("wb")
        except OSError as error:
            raise StorageError(
                f"cannot write model data in {scratch or tempfile.gettempdir()}: {why(error)}"
            ) from error
        self._discard = weakref.finalize(self, _discard, self._data, self._scratch)

    def input(self, name: str, dtype: Any, dims: Dims) -> str:
        """A graph input of numpy type ``dtype``; named dimensions are free."""
        self._inputs.append(_value_info(name, dtype, dims))
        return name

    def output(self, name: str, dtype: Any, dims: Dims) -> None:
        self._outputs.append(_value_info(name, dtype, dims))

    def node(
        self,
        op: str,
        inputs: Sequence[str],
        outputs: int | Sequence[str] = 1,
        domain: str = "",
        **attributes: Any,
    ) -> list[str]:
        """Add an operator; an input ``""`` is left out. ``outputs``: how many, or their names. Returns the names."""
        self._count += 1
        names = [f"{op}_{self._count}_{i}" for i in range(outputs)] if isinstance(outputs, int) else list(outputs)
        inputs = list(inputs)
        while inputs and not inputs[-1]:
            inputs.pop()
        label = f"{op}_{self._count}"
        self._nodes.append(helper.make_node(op, inputs, names, label, domain=domain, **attributes))
        return names

    def one(self, op: str, inputs: Sequence[str], domain: str = "", **attributes: Any) -> str:
        """:meth:`node` with a single output."""
        return self.node(op, inputs, 1, domain, **attributes)[0]

    def constant(self, value: NDArray[Any]) -> str:
        """A small constant; equal ones are shared."""
        key = (value.dtype.str, value.shape, value.tobytes())
        if key not in self._small:
            name = f"constant_{len(self._small)}"
            self._small[key] = name
            self._constants.append(onnx.numpy_helper.from_array(np.asarray(value), name))
        return self._small[key]

    def scalar(self, value: float) -> str:
        return self.constant(np.array(value, np.float32))

    def ints(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def weight(self, name: str, value: NDArray[Any]) -> str:
        """A constant in the data file, small ones in the proto. StorageError if it cannot be written."""
        if value.nbytes <= INLINE_LIMIT:
            self._constants.append(onnx.numpy_helper.from_array(np.asarray(value), name))
            return name
        padding = -self._offset % ALIGNMENT
        try:
            self._data.write(bytes(padding))
            self._data.write(np.ascontiguousarray(value).view(np.uint8).data)  # bfloat16 is no buffer
        except OSError as error:
            raise StorageError(
                f"cannot write {value.nbytes} bytes of {name} to {self._scratch}: {why(error)}"
            ) from error
        self._offset += padding
        self._constants.append(_reference(name, value.dtype, value.shape, self._offset, value.nbytes))
        self._offset += value.nbytes
        return name

    def alias(self, name: str, source: str, dims: Sequence[int]) -> str:
        """A second name and shape for the bytes of weight ``source``.

        A Reshape would say the same, but constant folding turns it into a copy.
        """
        tensor = next(tensor for tensor in self._constants if tensor.name == source)
        if math.prod(dims) != math.prod(tensor.dims):
            raise ValueError(f"{source} {list(tensor.dims)} cannot be seen as {list(dims)}")
        twin = onnx.TensorProto()
        twin.CopyFrom(tensor)
        twin.name = name
        del twin.dims[:]
        twin.dims.extend(dims)
        self._constants.append(twin)
        return name

    def rows(self, name: str, source: str, start: int, stop: int) -> str:
        """Rows ``start`` to ``stop`` of weight ``source``, in its bytes. ValueError unless both are among its rows and
        the first begins a page."""
        tensor = next(tensor for tensor in self._constants if tensor.name == source)
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        count, size = tensor.dims[0], math.prod(tensor.dims[1:]) * dtype.itemsize
        if not 0 <= start < stop <= count or start * size % ALIGNMENT or not tensor.external_data:
            raise ValueError(f"rows {start} to {stop} of {source} {list(tensor.dims)} cannot be seen by themselves")
        place = {entry.key: entry.value for entry in tensor.external_data}
        dims = [stop - start, *tensor.dims[1:]]
        self._constants.append(_reference(name, dtype, dims, int(place["offset"]) + start * size, dims[0] * size))
        return name

    def digest(self) -> str:
        """SHA-256 in hexadecimal of all that is in the graph so far, weights included."""
        self._data.flush()
        found = hashlib.sha256()
        with (self._scratch / DATA_FILE).open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
        for part in [*self._nodes, *self._constants, *self._inputs, *self._outputs]:
            found.update(part.SerializeToString(deterministic=True))
        return found.hexdigest()

    def rewrite(self, change: Callable[[list[onnx.NodeProto], list[str]], list[onnx.NodeProto]]) -> None:
        """Replace the nodes by ``change(nodes, names of the outputs)``."""
        self._nodes = change(self._nodes, [output.name for output in self._outputs])

    def save(self, folder: Path, producer: str, metadata: dict[str, str]) -> None:
        """Write ``model.onnx`` and ``model.onnx.data`` into ``folder`` (made if missing). Once.

        StorageError if it cannot be written.
        """
        graph = helper.make_graph(self._nodes, self._name, self._inputs, self._outputs, self._constants)
        opsets = [helper.make_opsetid("", self._opset), helper.make_opsetid(MICROSOFT, 1)]
        if any(node.domain == EDGE for node in self._nodes):  # a session without our kernels knows no such domain
            opsets.append(helper.make_opsetid(EDGE, 1))
        model = helper.make_model(graph, opset_imports=opsets, producer_name=producer, ir_version=10)
        helper.set_model_props(model, metadata)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._data.close()
            shutil.move(self._scratch / DATA_FILE, folder / DATA_FILE)
            (folder / MODEL_FILE).write_bytes(model.SerializeToString())
        except OSError as error:
            raise StorageError(f"cannot write the model into {folder}: {why(error)}") from error
        finally:
            self._discard()

    def discard(self) -> None:
        """Drop the graph and its data file. Happens by itself when the graph is forgotten."""
        self._discard()


def _discard(data: IO[bytes], scratch: Path) -> None:
    with suppress(OSError):  # of a full disk; what is still to be written is not wanted
        data.close()
    shutil.rmtree(scratch, ignore_errors=True)


def _onnx_type(dtype: Any) -> int:
    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def _value_info(name: str, dtype: Any, dims: Dims) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, _onnx_type(dtype), list(dims))


def _reference(name: str, dtype: Any, shape: Sequence[int], offset: int, length: int) -> onnx.TensorProto:
    tensor = TensorProto(name=name, data_type=_onnx_type(dtype), dims=shape, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", DATA_FILE), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
    return tensor
