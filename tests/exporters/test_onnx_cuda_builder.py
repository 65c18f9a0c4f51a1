"""Graphs for CUDA: their form, and their products, which the CPU provider can run too. Attention needs a GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

from edge_runtime.errors import ConfigError, UnsupportedModel
from exporters.architecture import Architecture, Layer, Rope
from exporters.builder import AttentionSpec
from exporters.graphs import write_graph
from exporters.network import build
from exporters.onnx_cuda_builder import OnnxCudaBuilder, block_size
from exporters.onnx_graph import MODEL_FILE
from exporters.onnx_operators import WeightFormat
from exporters.weights import QuantizedTensor, Tensor, dequantize
from tests.exporters.random_checkpoint import ARCHITECTURE, ROPE, RandomCheckpoint

TYPES = onnx.TensorProto


def graph_of(arch: Architecture, folder: Path, weights: WeightFormat = "fp16") -> onnx.GraphProto:
    builder = OnnxCudaBuilder(arch, weights, folder)
    build(RandomCheckpoint(arch), builder)
    builder.save(folder / "model")
    return onnx.load(folder / "model" / MODEL_FILE, load_external_data=False).graph


def form(value: onnx.ValueInfoProto) -> tuple[int, list[int | str]]:
    tensor = value.type.tensor_type
    return tensor.elem_type, [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]


def nodes(graph: onnx.GraphProto, op: str) -> list[onnx.NodeProto]:
    return [node for node in graph.node if node.op_type == op]


def attributes(node: onnx.NodeProto) -> dict[str, object]:
    return {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}


def test_inputs_and_outputs(tmp_path: Path) -> None:
    graph = graph_of(ARCHITECTURE, tmp_path)
    inputs = {value.name: form(value) for value in graph.input}
    cache = (TYPES.FLOAT16, ["blocks", 256, 2, 16])
    assert inputs.pop("input_ids") == (TYPES.INT32, ["tokens"])
    assert inputs.pop("cumulative_sequence_length") == (TYPES.INT32, ["sequence_ends"])
    assert inputs.pop("past_seqlens") == (TYPES.INT32, ["sequences"])
    assert inputs.pop("block_table") == (TYPES.INT32, ["sequences", "sequence_blocks"])
    assert inputs.pop("attention_bounds") == (TYPES.INT32, [3])
    assert inputs.pop("row_index") == (TYPES.INT32, ["rows"])
    assert inputs == {f"{kind}_cache.{layer}": cache for layer in range(8) for kind in ("key", "value")}
    outputs = {value.name: form(value) for value in graph.output}
    assert outputs.pop("logits") == (TYPES.FLOAT, ["rows", 160])
    assert outputs == {f"{kind}_cache_out.{layer}": cache for layer in range(8) for kind in ("key", "value")}


def test_attention(tmp_path: Path) -> None:
    layers = (Layer(ROPE), Layer(Rope(ROPE.inv_freq, interleaved=True), sliding_window=9), Layer(None))
    arch = replace(ARCHITECTURE, layers=layers, qk_norm=True, attention_softcap=5.0)
    graph = graph_of(arch, tmp_path)
    whole, window, unrotated = nodes(graph, "PagedAttention")
    for node in (whole, window, unrotated):
        found = attributes(node)
        assert (found["num_heads"], found["kv_num_heads"], found["softcap"]) == (4, 2, 5.0)
        assert found["scale"] == pytest.approx(0.25)
        assert found["qk_norm_epsilon"] == pytest.approx(1e-5)
        assert all(node.input[i] for i in (3, 4, 5, 6, 7, 12, 13))
        assert node.input[16] == "attention_bounds"
    assert [attributes(node)["local_window_size"] for node in (whole, window, unrotated)] == [-1, 9, -1]
    assert [attributes(node)["do_rotary"] for node in (whole, window, unrotated)] == [1, 1, 0]
    assert [attributes(node)["rotary_interleaved"] for node in (whole, window, unrotated)] == [0, 1, 0]
    assert whole.input[8] != window.input[8]
    assert list(unrotated.input[8:10]) == ["", ""]


def test_a_rope_switch_rotates_by_position(tmp_path: Path) -> None:
    arch = replace(ARCHITECTURE, rope_switch=64, layers=(Layer(replace(ROPE, long_inv_freq=ROPE.inv_freq)),) * 2)
    graph = graph_of(arch, tmp_path)
    assert {value.name: form(value) for value in graph.input}["position_ids"] == (TYPES.INT64, [1, "tokens"])
    rotations = nodes(graph, "RotaryEmbedding")
    assert [attributes(node)["num_heads"] for node in rotations] == [4, 2] * 2
    assert all(attributes(node)["do_rotary"] == 0 for node in nodes(graph, "PagedAttention"))
    tables = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    assert tables[rotations[0].input[2]] == [2 * arch.max_context, 8]


def test_a_rope_switch_with_head_norms_is_refused(tmp_path: Path) -> None:
    arch = replace(ARCHITECTURE, rope_switch=64, qk_norm=True)
    with pytest.raises(UnsupportedModel, match="head norms and a rope switch"):
        graph_of(arch, tmp_path)


def test_wide_families_compute_in_bfloat16(tmp_path: Path) -> None:
    graph = graph_of(replace(ARCHITECTURE, family="gemma3_text"), tmp_path)
    inputs = {value.name: form(value)[0] for value in graph.input}
    assert inputs["key_cache.0"] == TYPES.BFLOAT16
    kinds = {tensor.data_type for tensor in graph.initializer}
    assert TYPES.BFLOAT16 in kinds
    assert TYPES.FLOAT16 not in kinds


def test_32_bits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="16 bits; export with fp16, int8 or int4"):
        OnnxCudaBuilder(ARCHITECTURE, "fp32", tmp_path)


def test_an_unknown_engine(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown engine 'tensorrt'; known: onnx, onnx-coreml, onnx-cuda, openvino"):
        write_graph(RandomCheckpoint(ARCHITECTURE), "tensorrt", "fp16", tmp_path, tmp_path)  # type: ignore[arg-type]


def test_a_weight_past_the_range_is_refused(tmp_path: Path) -> None:
    builder = OnnxCudaBuilder(ARCHITECTURE, "fp16", tmp_path)
    with pytest.raises(UnsupportedModel, match=r"a weight of 70000 is over float16's range"):
        builder.embed(np.full((160, 64), 70000, np.float32))


def test_a_group_that_no_kernel_takes(tmp_path: Path) -> None:
    builder = OnnxCudaBuilder(ARCHITECTURE, "int4", tmp_path)
    with pytest.raises(UnsupportedModel, match=r"embed: .*not 8; export it with other weights"):
        builder.embed(quantized(160, 64, 4, 8, "integer"))


@pytest.mark.parametrize(("head_dim", "tokens"), [(16, 256), (64, 256), (80, 128), (128, 128), (256, 64)])
def test_blocks_are_as_the_attention_kernel_wants(head_dim: int, tokens: int) -> None:
    assert block_size(head_dim) == tokens


def test_head_norms_come_in_pairs(tmp_path: Path) -> None:
    builder = OnnxCudaBuilder(replace(ARCHITECTURE, qk_norm=True), "fp16", tmp_path)
    ones = np.ones(16, np.float32)
    spec = AttentionSpec(0, Layer(ROPE), 4, 2, 16, 0.25, norm_eps=1e-5, q_norm=ones, k_norm=2 * ones)
    builder.attention("qkv", spec)
    builder.save(tmp_path / "model")
    graph = onnx.load(tmp_path / "model" / MODEL_FILE).graph
    (node,) = nodes(graph, "PagedAttention")
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    assert [values[node.input[i]].tolist() for i in (12, 13)] == [[1.0] * 16, [2.0] * 16]


def quantized(rows: int, columns: int, bits: int, group: int, zero: str) -> QuantizedTensor:
    rng = np.random.default_rng(rows + columns + bits)
    shape = (rows, columns // group)
    middle = 2 ** (bits - 1)
    zeros = {
        "fractional": middle + rng.uniform(-middle / 2, middle / 2, shape),
        "integer": rng.integers(0, 2**bits, shape),
        "middle": np.full(shape, middle),
    }[zero]
    scale = rng.uniform(0.5, 1.5, shape).astype(np.float16).astype(np.float32) / np.float32(2**bits)
    codes = rng.integers(0, 2**bits, (rows, columns)).astype(np.uint8)
    return QuantizedTensor(codes, scale, zeros.astype(np.float32), bits)


def product(table: Tensor, parts: list[Tensor], bias: NDArray[np.float32] | None, folder: Path) -> NDArray[np.float32]:
    """Embedding rows 0 … 9 of ``table`` through ``parts`` joined, on the CPU; both built for CUDA."""
    hidden = table.shape[1]
    arch = replace(ARCHITECTURE, vocab_size=sum(part.shape[0] for part in parts), hidden_size=hidden)
    builder = OnnxCudaBuilder(arch, "int4", folder)
    y = builder.linear(builder.embed(table), [(part, bias) for part in parts], "part")
    builder._graph.node("Cast", [y], ["logits"], to=1)
    builder._graph.output("logits", np.float32, ["tokens", arch.vocab_size])
    builder.save(folder / "model")
    session = onnxruntime.InferenceSession(folder / "model" / MODEL_FILE, providers=["CPUExecutionProvider"])
    feeds = {each.name: np.zeros([d if isinstance(d, int) else 1 for d in each.shape], np.int32) for each in
             session.get_inputs()}  # fmt: skip
    feeds["input_ids"] = np.arange(10, dtype=np.int32)
    return np.asarray(session.run(["logits"], feeds)[0])


@pytest.mark.parametrize("zero", ["fractional", "integer", "middle"])
@pytest.mark.parametrize(("bits", "group", "columns"), [(4, 32, 1024), (4, 32, 96), (4, 16, 64), (8, 32, 96)])
def test_products_are_of_the_very_weights(zero: str, bits: int, group: int, columns: int, tmp_path: Path) -> None:
    table = np.random.default_rng(0).standard_normal((16, columns)).astype(np.float16).astype(np.float32)
    matrix = quantized(48, columns, bits, group, zero)
    exact = table[:10] @ matrix.dequantize().T
    got = product(table, [matrix], None, tmp_path)
    assert np.abs(got - exact).max() < 3e-3 * np.abs(exact).max()
    if zero == "fractional":
        rounded = QuantizedTensor(matrix.codes, matrix.scale, np.rint(matrix.zero), bits)
        floor = np.abs(table[:10] @ rounded.dequantize().T - exact).max()
        assert np.abs(got - exact).max() < (floor / 8 if bits == 4 else floor)  # what the offsets are for


@pytest.mark.parametrize("zero", ["fractional", "integer", "middle"])
@pytest.mark.parametrize("bits", [4, 8])
def test_packed_embeddings(zero: str, bits: int, tmp_path: Path) -> None:
    table = quantized(16, 64, bits, 32, zero)
    identity = np.eye(64, dtype=np.float32)
    got = product(table, [identity], None, tmp_path)
    np.testing.assert_allclose(got, table.dequantize()[:10], atol=3e-3, rtol=0)


def test_joined_parts_and_their_bias(tmp_path: Path) -> None:
    table = np.random.default_rng(0).standard_normal((16, 64)).astype(np.float16).astype(np.float32)
    parts: list[Tensor] = [
        quantized(48, 64, 4, 32, "fractional"),
        quantized(48, 64, 4, 32, "integer"),
        quantized(48, 64, 8, 32, "middle"),
        np.random.default_rng(1).standard_normal((48, 64)).astype(np.float32),
    ]
    bias = np.linspace(-2, 2, 48, dtype=np.float32)
    exact = np.concatenate([table[:10] @ dequantize(part).T + bias for part in parts], axis=1)
    got = product(table, parts, bias, tmp_path)
    assert np.abs(got - exact).max() < 3e-3 * np.abs(exact).max()
