"""One operator of ``kernels/`` at a time, in a graph of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper

from devices.edge_kernels import kernels_library
from exporters.edge_weights import PackedMatrix

Arrays = dict[str, NDArray[Any]]


def run(op: str, inputs: Arrays, absent: tuple[str, ...] = (), **attributes: Any) -> NDArray[np.float32]:
    """The output; ``inputs`` in the operator's order, without those in ``absent``. Arrays are bound."""
    dims = {name: [f"{name}_{i}" for i in range(value.ndim)] for name, value in inputs.items()}
    kinds = {name: helper.np_dtype_to_tensor_dtype(value.dtype) for name, value in inputs.items()}
    given = [name for name in inputs if name not in absent]
    graph = helper.make_graph(
        [
            helper.make_node(
                op, [name if name in given else "" for name in inputs], ["y"], domain="edge_glm", **attributes
            )
        ],
        "one",
        [helper.make_tensor_value_info(name, kinds[name], dims[name]) for name in given],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["rows", "columns"])],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("edge_glm", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    options.log_severity_level = 4  # what fails comes as an exception too
    options.register_custom_ops_library(str(kernels_library()))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for name in given:
        value = inputs[name]
        binding.bind_input(name, "cpu", 0, value.dtype, value.shape, value.ctypes.data)
    binding.bind_output("y", "cpu")
    session.run_with_iobinding(binding)
    y: NDArray[np.float32] = binding.get_outputs()[0].numpy().copy()
    return y


def matmul(
    x: NDArray[np.float32],
    packed: PackedMatrix,
    activation_bits: int,
    bias: NDArray[np.float32] | None = None,
    norm: NDArray[np.float32] | None = None,
    addend: NDArray[np.float32] | None = None,
    **attributes: Any,
) -> NDArray[np.float32]:
    """``x`` (tokens, columns) times the packed matrix."""
    optional = {"bias": bias, "norm": norm, "addend": addend}
    absent = tuple(name for name, value in optional.items() if value is None)
    inputs: Arrays = {"x": x, "weight": packed.data}
    inputs |= {name: x if value is None else value for name, value in optional.items()}
    shape = {"K": packed.columns, "N": packed.rows, "bits": packed.bits, "block": packed.block}
    attributes |= {**shape, "offsets": int(packed.offsets), "activation_bits": activation_bits}
    return run("QuantizedMatMul", inputs, absent, **attributes)
