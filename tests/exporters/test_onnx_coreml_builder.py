"""CoreML's graphs: nothing that its provider does not take, static shapes, one weight file. Numbers are checked in
tests/test_family_logits.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from edge_runtime.errors import UnsupportedModel
from exporters.graphs import write_graph
from exporters.onnx_coreml_builder import CONTEXT, STEP, OnnxCoreMLBuilder
from exporters.safetensors_checkpoint import SafetensorsCheckpoint
from exporters.synthetic import SyntheticCheckpoint

FAMILIES = sorted((Path(__file__).parents[1] / "fixtures" / "families").iterdir())
TAKEN = frozenset(
    {
        *("Add", "Cast", "Concat", "Div", "Gelu", "Gemm", "GatherND", "Identity", "MatMul", "Mul", "ReduceMean"),
        *("Reshape", "Sigmoid", "Softmax", "Split", "Sqrt", "Sub", "Tanh", "Transpose", "Unsqueeze"),
    }
)
"""Of those that the provider has for MLProgram: tools/ci_build/github/apple/coreml_supported_mlprogram_ops.md of
github.com/microsoft/onnxruntime."""
FILES = {"model.onnx": STEP, "decode.onnx": 1}


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda folder: folder.name)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("coreml")
    write_graph(SafetensorsCheckpoint(request.param), "onnx-coreml", "fp16", target / "model", target)
    return target / "model"


def test_two_graphs_and_one_weight_file(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["decode.onnx", "model.onnx", "model.onnx.data"]
    size = (folder / "model.onnx.data").stat().st_size
    places = []
    for file in FILES:
        model = onnx.load(folder / file, load_external_data=False)
        external = [tensor for tensor in model.graph.initializer if tensor.external_data]
        told = [{entry.key: entry.value for entry in tensor.external_data} for tensor in external]
        assert all(int(each["offset"]) + int(each["length"]) <= size for each in told)
        assert {each["location"] for each in told} == {"model.onnx.data"}
        places.append([(tensor.name, *sorted(each.items())) for tensor, each in zip(external, told, strict=True)])
    assert places[0] == places[1]


@pytest.mark.parametrize("file", FILES)
def test_only_operators_that_coreml_takes(folder: Path, file: str) -> None:
    nodes = onnx.load(folder / file, load_external_data=False).graph.node
    assert {node.domain for node in nodes} == {""}
    assert {node.op_type for node in nodes} <= TAKEN
    constants = {each.name for each in onnx.load(folder / file, load_external_data=False).graph.initializer}
    for node in nodes:
        if node.op_type == "Split":
            assert node.input[1] in constants
        if node.op_type == "Gemm":
            assert node.input[1] in constants


@pytest.mark.parametrize("file", FILES)
def test_shapes_are_static(folder: Path, file: str) -> None:
    graph = onnx.shape_inference.infer_shapes(onnx.load(folder / file, load_external_data=False)).graph
    for value in [*graph.input, *graph.output, *graph.value_info]:
        dims = value.type.tensor_type.shape.dim
        assert all(dim.HasField("dim_value") for dim in dims), value.name
    inputs = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in graph.input}
    assert inputs["input_ids"] == [FILES[file], 1]
    assert inputs["past.0.key"][1] <= CONTEXT


def test_the_two_weight_files_are_one(tmp_path: Path) -> None:
    """Each graph writes its own; that of the second is dropped."""
    checkpoint = SyntheticCheckpoint("tiny")
    builder = OnnxCoreMLBuilder(checkpoint.architecture, "fp32", tmp_path)
    from exporters.network import build

    build(checkpoint, builder)
    for index, graph in enumerate(builder._graphs):
        graph.save(tmp_path / str(index))
    first, second = (np.fromfile(tmp_path / name / "model.onnx.data", np.uint8) for name in ("0", "1"))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("weights", ["int4", "int8"])
def test_quantized_weights_are_refused(weights: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=f"CoreML takes weights as fp16 or fp32, not {weights}; choose"):
        write_graph(SyntheticCheckpoint("tiny"), "onnx-coreml", weights, tmp_path / "m", tmp_path)  # type: ignore[arg-type]
