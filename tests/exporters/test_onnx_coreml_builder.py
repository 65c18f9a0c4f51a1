"""CoreML's graphs: nothing that its provider does not take, static shapes, one weight file. Numbers are checked in
tests/test_family_logits.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from edge_runtime.errors import UnsupportedModel
from exporters.graphs import write_graph
from exporters.network import build
from exporters.onnx_coreml_builder import CONTEXT, STEP, OnnxCoreMLBuilder
from exporters.safetensors_checkpoint import SafetensorsCheckpoint
from exporters.synthetic import SyntheticCheckpoint
from tests.exporters.random_checkpoint import ARCHITECTURE, RandomCheckpoint

FAMILIES = sorted((Path(__file__).parents[1] / "fixtures" / "families").iterdir())
TAKEN = {
    *("Add", "Cast", "Concat", "Div", "Gather", "Gelu", "Gemm", "Identity", "MatMul", "Mul", "ReduceMean", "Reshape"),
    *("Sigmoid", "Softmax", "Split", "Sqrt", "Sub", "Tanh", "Transpose", "Unsqueeze"),
}
"""Of those that the provider has for MLProgram: tools/ci_build/github/apple/coreml_supported_mlprogram_ops.md of
github.com/microsoft/onnxruntime, and Gather, which only gather_op_builder.cc of the provider there tells."""
LARGEST_OPSET, LARGEST_DIM = 20, 16384
"""What it takes at most of either: GetMaxSupportedOpSet in base_op_builder.h, IsInputSupported in helper.cc."""
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
    check_operators(folder / file)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("file", FILES)
def test_a_large_vocabulary_and_a_long_context(tmp_path: Path, file: str, tied: bool) -> None:
    """In blocks, over the bytes of the embedding where that is the head."""
    arch = replace(ARCHITECTURE, vocab_size=40_000, max_context=100_000, tied_head=tied, logit_softcap=30.0)
    write_graph(RandomCheckpoint(arch), "onnx-coreml", "fp16", tmp_path / "m", tmp_path)
    check_operators(tmp_path / "m" / file)
    tables = (1 if tied else 2) * 40_000 * arch.hidden_size * 2
    assert tables < (tmp_path / "m" / "model.onnx.data").stat().st_size < tables + 40_000 * arch.hidden_size


@pytest.mark.parametrize("file", FILES)
def test_a_wide_mlp(tmp_path: Path, file: str) -> None:
    """Its gate is two matrices then."""
    arch = replace(ARCHITECTURE, intermediate_size=9000)
    write_graph(RandomCheckpoint(arch), "onnx-coreml", "fp16", tmp_path / "m", tmp_path)
    check_operators(tmp_path / "m" / file)


def check_operators(path: Path) -> None:
    """Names, versions and sizes; only the table of a large embedding may be too long, whose rows the CPU then finds."""
    model = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False))
    graph = model.graph
    assert {node.domain for node in graph.node} == {""}
    assert {node.op_type for node in graph.node} <= TAKEN
    (opset,) = [each.version for each in model.opset_import if each.domain == ""]
    constants = {each.name: list(each.dims) for each in graph.initializer}
    values = [*graph.input, *graph.output, *graph.value_info]
    dims = constants | {each.name: [dim.dim_value for dim in each.type.tensor_type.shape.dim] for each in values}
    casts = [node for node in graph.node if node.op_type == "Cast" and node.input[0] in constants]
    constants |= {node.output[0]: constants[node.input[0]] for node in casts}  # ONNX Runtime folds them first
    for node in graph.node:
        assert onnx.defs.get_schema(node.op_type, opset).since_version <= LARGEST_OPSET
        long = [name for name in node.input if name and max(dims[name], default=1) > LARGEST_DIM]
        assert long == [] or (node.op_type, long) == ("Gather", ["embed.weight"])
        if node.op_type in ("Split", "Gemm"):
            assert node.input[1] in constants


def test_a_key_for_what_coreml_compiles(folder: Path, tmp_path: Path) -> None:
    """Of letters and digits, at most 64; for every graph another, for the same export the same."""
    keys = [key_of(folder / file) for file in FILES]
    assert len(set(keys)) == 2
    assert all(key.isalnum() and len(key) <= 64 for key in keys)
    found = []
    for name, eps in (("a", 1e-5), ("b", 1e-5), ("c", 1e-4)):
        write_graph(
            RandomCheckpoint(replace(ARCHITECTURE, norm_eps=eps)), "onnx-coreml", "fp16", tmp_path / name, tmp_path
        )
        found.append(key_of(tmp_path / name / "model.onnx"))
    assert found[0] == found[1] != found[2]


def key_of(path: Path) -> str:
    properties = onnx.load(path, load_external_data=False).metadata_props
    return next(each.value for each in properties if each.key == "COREML_CACHE_KEY")


@pytest.mark.parametrize(("family", "kind"), [("gemma2", onnx.TensorProto.FLOAT), ("llama", onnx.TensorProto.FLOAT16)])
def test_activations_beyond_float16(tmp_path: Path, family: str, kind: int) -> None:
    """Gemma's: matrices are fp16, the rest is float32."""
    checkpoint = RandomCheckpoint(replace(ARCHITECTURE, family=family))
    write_graph(checkpoint, "onnx-coreml", "fp16", tmp_path / "m", tmp_path)
    graph = onnx.load(tmp_path / "m" / "model.onnx", load_external_data=False).graph
    types = {each.name: each.type.tensor_type.elem_type for each in graph.input}
    assert types["past.0.key"] == types["mask"] == kind
    matrices = [each for each in graph.initializer if each.name.endswith(".weight")]
    assert {each.data_type for each in matrices} == {onnx.TensorProto.FLOAT16}


@pytest.mark.parametrize("file", FILES)
def test_shapes_are_static(folder: Path, file: str) -> None:
    graph = onnx.shape_inference.infer_shapes(onnx.load(folder / file, load_external_data=False)).graph
    for value in [*graph.input, *graph.output, *graph.value_info]:
        dims = value.type.tensor_type.shape.dim
        assert all(dim.HasField("dim_value") for dim in dims), value.name
    inputs = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in graph.input}
    assert inputs["input_ids"] == [FILES[file]]
    assert inputs["past.0.key"][1] <= CONTEXT


def test_the_two_weight_files_are_one(tmp_path: Path) -> None:
    """Each graph writes its own; that of the second is dropped."""
    checkpoint = SyntheticCheckpoint("tiny")
    builder = OnnxCoreMLBuilder(checkpoint.architecture, "fp32", tmp_path)
    build(checkpoint, builder)
    for index, graph in enumerate(builder._graphs):
        graph.save(tmp_path / str(index))
    first, second = (np.fromfile(tmp_path / name / "model.onnx.data", np.uint8) for name in ("0", "1"))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("weights", ["int4", "int8"])
def test_quantized_weights_are_refused(weights: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=f"CoreML takes weights as fp16 or fp32, not {weights}; choose"):
        write_graph(SyntheticCheckpoint("tiny"), "onnx-coreml", weights, tmp_path / "m", tmp_path)  # type: ignore[arg-type]
