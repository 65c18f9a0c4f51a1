"""Graphs of our own CPU operators: their form and, where the kernels are built, their logits against the plain twin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from devices.base import DecoderOptions, Step
from edge_runtime.errors import UnsupportedModel
from exporters.architecture import Architecture, Layer, Rope
from exporters.checkpoint import Checkpoint
from exporters.edge_weights import pack
from exporters.graphs import write_graph
from exporters.network import build
from exporters.onnx_builder import OnnxBuilder
from exporters.onnx_edge_builder import OnnxEdgeBuilder, PreciseOnnxEdgeBuilder
from exporters.onnx_graph import DATA_FILE, EDGE, MICROSOFT, MODEL_FILE
from exporters.onnx_operators import WeightFormat
from exporters.quantize import QuantizedCheckpoint
from exporters.weights import QuantizedTensor, Tensor
from tests.decoder_spec import decoder_spec
from tests.devices.written import skip_without
from tests.exporters.numpy_builder import run
from tests.exporters.random_checkpoint import ARCHITECTURE, ROPE, RandomCheckpoint

TYPES = onnx.TensorProto
ARCH = replace(
    ARCHITECTURE,
    vocab_size=150,  # no whole number of panels
    layers=(Layer(ROPE), Layer(ROPE, sliding_window=9)),
    tied_head=True,
    qkv_bias=True,
)
IDS = np.random.default_rng(5).integers(0, ARCH.vocab_size, 80)
INTERLEAVED = replace(ROPE, interleaved=True)
PARTIAL = Rope(ROPE.inv_freq[:4], scale=1.1)
VARIANTS: dict[str, dict[str, Any]] = {
    "head norms": {"qk_norm": True},
    "head norms, interleaved": {"qk_norm": True, "layers": (Layer(INTERLEAVED), Layer(INTERLEAVED, 9))},
    "interleaved": {"layers": (Layer(INTERLEAVED), Layer(INTERLEAVED, 40))},
    "partial": {"layers": (Layer(PARTIAL), Layer(replace(PARTIAL, interleaved=True), 33))},
    "no positions": {"layers": (Layer(ROPE, 1), Layer(None))},
    "two ropes": {"layers": (Layer(ROPE, 32), Layer(Rope(ROPE.inv_freq, 1.3)))},
    "gelu by tanh": {"activation": "gelu_tanh"},
    "gelu": {"activation": "gelu"},
    "post norms": {"post_norms": True},
    "soft caps": {"attention_softcap": 3.0, "logit_softcap": 2.0},
    "multipliers": {"embedding_scale": 3.0, "residual_scale": 0.4, "logit_scale": 0.25, "attention_scale": 0.1},
    "biases": {"o_bias": True, "mlp_bias": True},
    "one key head": {"num_kv_heads": 1},
    "wide heads": {"head_dim": 48, "num_kv_heads": 4},
}
NARROW, WIDE = 0.025, 2e-3
"""Bounds on the error of logits: with activations of 8 bits, and with those of 16 or more and a cache of float16."""


def blocks(
    zero: str, bits: int = 4, head_bits: int = 8, group: int = 32
) -> Callable[[str, NDArray[np.float32]], Tensor]:
    """Rounds matrices to blocks like GGUF's. ``zero``: "fractional", "integer", "middle" or "float" (not rounded)."""

    def quantize(name: str, values: NDArray[np.float32]) -> Tensor:
        if zero == "float":
            return values
        width = head_bits if name in ("embed", "head") else bits
        parts = values.reshape(len(values), -1, group)
        low, high = parts.min(-1), parts.max(-1)
        if zero == "middle":
            high = np.maximum(-low, high)
            low = -high
        scale = ((high - low) / (2**width - 1)).astype(np.float16).astype(np.float32)
        zeros = {"fractional": -low / scale, "integer": np.rint(-low / scale)}.get(
            zero, np.full_like(scale, 2 ** (width - 1))
        )
        codes = np.clip(np.rint(parts / scale[..., None] + zeros[..., None]), 0, 2**width - 1).astype(np.uint8)
        return QuantizedTensor(codes.reshape(values.shape), scale, zeros, width)

    return quantize


def export(
    checkpoint: Checkpoint, weights: WeightFormat, folder: Path, new_builder: type[OnnxEdgeBuilder] = OnnxEdgeBuilder
) -> onnx.ModelProto:
    folder.mkdir(exist_ok=True)
    builder = new_builder(checkpoint.architecture, weights, folder)
    build(checkpoint, builder)
    builder.save(folder)
    return onnx.load(folder / MODEL_FILE)


def form(value: onnx.ValueInfoProto) -> tuple[int, list[int | str]]:
    tensor = value.type.tensor_type
    return tensor.elem_type, [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]


def nodes(model: onnx.ModelProto, op: str) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == op]


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}


def constants(model: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


class TestForm:
    def test_inputs_and_outputs(self, tmp_path: Path) -> None:
        model = export(RandomCheckpoint(ARCH, blocks("fractional")), "int4", tmp_path)
        assert {value.name: form(value) for value in model.graph.input} == {
            "input_ids": (TYPES.INT64, ["tokens"]),
            "positions": (TYPES.INT64, ["tokens"]),
            "begins": (TYPES.INT32, ["sequence_ends"]),
            "past": (TYPES.INT32, ["sequences"]),
            "block_table": (TYPES.INT32, ["sequences", "sequence_blocks"]),
            "row_index": (TYPES.INT64, ["rows"]),
            "kv_cache": (TYPES.UINT8, ["blocks", 2, 2, 2, "head_bytes"]),
        }
        assert {value.name: form(value) for value in model.graph.output} == {"logits": (TYPES.FLOAT, ["rows", 150])}

    @pytest.mark.parametrize("weights", ["fp32", "fp16", "int8", "int4"])
    def test_domains(self, weights: WeightFormat, tmp_path: Path) -> None:
        model = export(QuantizedCheckpoint(RandomCheckpoint(ARCH), weights), weights, tmp_path)
        assert {entry.domain: entry.version for entry in model.opset_import} == {"": 21, MICROSOFT: 1, EDGE: 1}
        ours = {node.op_type for node in model.graph.node if node.domain == EDGE}
        theirs = {node.op_type for node in model.graph.node if node.domain == MICROSOFT}
        plain = {node.op_type for node in model.graph.node if not node.domain}
        if weights in ("int8", "int4"):
            assert ours == {"QuantizedGather", "QuantizedMatMul", "PagedAttention"}
            assert plain == {"Gather", "Identity"}
            assert not theirs
        else:
            assert theirs == {"SkipSimplifiedLayerNormalization"}
            assert ours == {"PagedAttention", "GatedUnit"}
            assert {"MatMul", "Gemm", "Gather"} <= plain
            assert ("Cast" in plain) == (weights == "fp16")

    def test_the_domain_is_imported_only_where_it_is_used(self, tmp_path: Path) -> None:
        builder = OnnxBuilder(ARCH, "fp32", tmp_path)
        build(RandomCheckpoint(ARCH), builder)
        builder.save(tmp_path / "model")
        model = onnx.load(tmp_path / "model" / MODEL_FILE, load_external_data=False)
        assert [entry.domain for entry in model.opset_import] == ["", MICROSOFT]

    @pytest.mark.parametrize("head_bits", [4, 8])
    @pytest.mark.parametrize("bits", [4, 8])
    def test_products(self, bits: int, head_bits: int, tmp_path: Path) -> None:
        model = export(RandomCheckpoint(ARCH, blocks("fractional", bits, head_bits)), "int4", tmp_path)
        *layers, head = nodes(model, "QuantizedMatMul")
        shapes = [(64, 128), (64, 64), (64, 256), (128, 64)] * 2  # qkv, o, gate and up, down
        found = [attributes(node) for node in layers]
        assert [(each.pop("K"), each.pop("N")) for each in found] == shapes
        narrow = 8 if bits == 4 else 16
        assert [each.pop("activation_bits") for each in found] == [16, narrow, narrow, narrow] * 2
        assert all((each.pop("bits"), each.pop("block"), each.pop("offsets")) == (bits, 32, 1) for each in found)
        norm = {"epsilon": pytest.approx(1e-5)}
        assert found == [norm, {}, norm, {"gate": 0}] * 2
        form = {"K": 64, "N": 150, "bits": head_bits, "block": 32, "offsets": 1, "activation_bits": 16}
        assert attributes(head) == {**form, **norm}
        given = [[place for place, name in enumerate(node.input) if name] for node in layers]
        assert given == [[0, 1, 2, 3], [0, 1, 4], [0, 1, 3], [0, 1, 4]] * 2  # bias, norm, addend

    def test_precise_products(self, tmp_path: Path) -> None:
        model = export(RandomCheckpoint(ARCH, blocks("fractional")), "int4", tmp_path, PreciseOnnxEdgeBuilder)
        found = [attributes(node) for node in nodes(model, "QuantizedMatMul")]
        assert [(each["bits"], each["activation_bits"]) for each in found] == [(4, 16)] * 8 + [(8, 16)]

    def test_matrices_are_packed_and_their_bias_is_joined(self, tmp_path: Path) -> None:
        checkpoint = RandomCheckpoint(ARCH, blocks("fractional"))
        model = export(checkpoint, "int4", tmp_path)
        held = constants(model)
        qkv, out = nodes(model, "QuantizedMatMul")[:2]
        bias = np.concatenate([checkpoint.tensor(f"layers.0.{name}.bias") for name in "qkv"])
        np.testing.assert_array_equal(held[qkv.input[2]], bias)
        matrix = checkpoint.tensor("layers.0.o")
        assert isinstance(matrix, QuantizedTensor)
        np.testing.assert_array_equal(held[out.input[1]], pack(matrix).data)

    def test_formats_that_differ_are_products_of_their_own(self, tmp_path: Path) -> None:
        wide, narrow = blocks("fractional", 8), blocks("fractional", 4)
        checkpoint = RandomCheckpoint(
            ARCH, lambda name, values: (wide if name.endswith(".v") else narrow)(name, values)
        )
        model = export(checkpoint, "int4", tmp_path)
        first, second = nodes(model, "QuantizedMatMul")[:2]
        assert [(attributes(node)["N"], attributes(node)["bits"]) for node in (first, second)] == [(96, 4), (32, 8)]
        assert nodes(model, "Concat")[0].input == [first.output[0], second.output[0]]

    @pytest.mark.parametrize("head_bits", [4, 8])
    def test_a_tied_head_is_the_embedding_s_bytes(self, head_bits: int, tmp_path: Path) -> None:
        sizes = []
        for tied in (True, False):
            checkpoint = RandomCheckpoint(replace(ARCH, tied_head=tied), blocks("middle", head_bits=head_bits))
            model = export(checkpoint, "int4", tmp_path / str(tied))
            (rows,) = nodes(model, "QuantizedGather")
            offsets = int(head_bits == 4)  # the zero points of 8 bits are all 128
            assert attributes(rows) == {"K": 64, "N": 150, "bits": head_bits, "block": 32, "offsets": offsets}
            head = nodes(model, "QuantizedMatMul")[-1]
            assert (head.input[1] == rows.input[1]) == tied
            sizes.append((tmp_path / str(tied) / DATA_FILE).stat().st_size)
        # 150 rows in whole panels, two blocks' d each and, with 4 bits, m
        table = 160 * 64 * head_bits // 8 + 160 * 2 * (4 if offsets else 2)
        assert 0 <= sizes[1] - sizes[0] - table < 4096  # up to alignment

    def test_float_matrices_beside_quantized_ones(self, tmp_path: Path) -> None:
        rounded = blocks("integer")
        arch = replace(ARCH, tied_head=False)
        checkpoint = RandomCheckpoint(
            arch, lambda name, values: values if name in ("head", "layers.1.down") else rounded(name, values)
        )
        model = export(checkpoint, "int4", tmp_path)
        held = constants(model)
        down, head = nodes(model, "MatMul")
        np.testing.assert_array_equal(held[down.input[1]], np.asarray(checkpoint.tensor("layers.1.down")).T)
        np.testing.assert_array_equal(held[head.input[1]], np.asarray(checkpoint.tensor("head")).T)
        assert len(nodes(model, "QuantizedMatMul")) == 7

    def test_attention(self, tmp_path: Path) -> None:
        layers = (Layer(ROPE), Layer(INTERLEAVED, sliding_window=9), Layer(None))
        arch = replace(ARCH, layers=layers, qk_norm=True, attention_softcap=5.0)
        checkpoint = RandomCheckpoint(arch, blocks("integer"))
        model = export(checkpoint, "int4", tmp_path)
        held = constants(model)
        found = nodes(model, "PagedAttention")
        for index, node in enumerate(found):
            form = attributes(node)
            assert [form[name] for name in ("layer", "num_heads", "kv_num_heads", "head_dim")] == [index, 4, 2, 16]
            assert (form["scale"], form["softcap"], form["epsilon"]) == pytest.approx((0.25, 5.0, 1e-5))
            assert list(node.input[1:6]) == ["kv_cache", "begins", "past", "block_table", "positions"]
            for name, norm in zip(node.input[8:], ("q_norm", "k_norm"), strict=True):
                np.testing.assert_array_equal(held[name], checkpoint.tensor(f"layers.{index}.{norm}"))
        assert [attributes(node)["window"] for node in found] == [0, 9, 0]
        assert [attributes(node)["rotary_interleaved"] for node in found] == [0, 1, 0]
        assert list(found[2].input[6:8]) == ["", ""]
        angles = np.outer(np.arange(arch.max_context), ROPE.inv_freq)
        np.testing.assert_allclose(held[found[0].input[6]], np.cos(angles), atol=1e-6)
        np.testing.assert_allclose(held[found[0].input[7]], np.sin(angles), atol=1e-6)

    def test_attention_without_what_is_optional(self, tmp_path: Path) -> None:
        model = export(RandomCheckpoint(replace(ARCH, layers=(Layer(None),))), "fp32", tmp_path)
        (node,) = nodes(model, "PagedAttention")
        assert len(node.input) == 6
        kinds = {each.name: each.type for each in node.attribute}
        floats = {name for name, kind in kinds.items() if kind == onnx.AttributeProto.FLOAT}
        assert floats == {"scale", "softcap", "epsilon"}
        assert attributes(node)["softcap"] == 0.0

    def test_a_rope_switch_stacks_both_tables(self, tmp_path: Path) -> None:
        rope = replace(ROPE, long_inv_freq=PARTIAL.inv_freq * 2, long_scale=1.2)
        arch = replace(ARCH, rope_switch=64, layers=(Layer(rope),))
        model = export(RandomCheckpoint(arch), "fp32", tmp_path)
        cos = constants(model)[nodes(model, "PagedAttention")[0].input[6]]
        assert cos.shape == (2 * arch.max_context, 8)
        assert (cos[0, 0], cos[arch.max_context, 0]) == pytest.approx((1.0, 1.2))

    def test_gates(self, tmp_path: Path) -> None:
        codes = {}
        for activation in ("silu", "gelu_tanh", "gelu"):
            arch = replace(ARCH, activation=activation)
            model = export(RandomCheckpoint(arch), "fp32", tmp_path / activation)
            (codes[activation],) = {attributes(node)["activation"] for node in nodes(model, "GatedUnit")}
        assert codes == {"silu": 0, "gelu_tanh": 1, "gelu": 2}

    def test_graph_of_the_engine(self, tmp_path: Path) -> None:
        made = write_graph(RandomCheckpoint(ARCH), "onnx-edge", "fp32", tmp_path / "model", tmp_path)
        assert made == ("onnxruntime-edge", MODEL_FILE)
        assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [MODEL_FILE, DATA_FILE]


class TestRefusals:
    def test_a_group_without_a_kernel(self, tmp_path: Path) -> None:
        with pytest.raises(UnsupportedModel, match=r"embed: .* not 8; export it with other weights"):
            export(RandomCheckpoint(ARCH, blocks("integer", group=8)), "int4", tmp_path)

    def test_constants_beyond_float16(self, tmp_path: Path) -> None:
        def large(name: str, values: NDArray[np.float32]) -> Tensor:
            tensor = blocks("integer")(name, values)
            assert isinstance(tensor, QuantizedTensor)
            return replace(tensor, scale=tensor.scale * np.float32(1e7)) if name == "layers.1.o" else tensor

        checkpoint = RandomCheckpoint(ARCH, large)
        with pytest.raises(UnsupportedModel, match=r"layers\.1\.o\.0: its largest scale, .* float16's largest, 65504"):
            export(checkpoint, "int4", tmp_path)

    def test_a_tied_head_needs_an_embedding(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="needs embed"):
            OnnxEdgeBuilder(ARCH, "int4", tmp_path).lm_head("x", None, 1.0, None)


class TestLogits:
    """Of one sequence in several steps, root mean square against the twin's, relative."""

    @pytest.fixture(autouse=True)
    def kernels(self) -> None:
        skip_without("edge:cpu")

    @staticmethod
    def error(
        checkpoint: Checkpoint,
        weights: WeightFormat,
        folder: Path,
        sizes: tuple[int, ...] = (30, 1, 33, 1),
        new_builder: type[OnnxEdgeBuilder] = OnnxEdgeBuilder,
    ) -> float:
        from devices.onnxruntime_edge import OnnxRuntimeEdgeDecoder

        arch: Architecture = checkpoint.architecture
        export(checkpoint, weights, folder, new_builder)
        spec = decoder_spec(arch, "onnxruntime-edge", folder / MODEL_FILE)
        decoder = OnnxRuntimeEdgeDecoder(spec, DecoderOptions(max_sequences=1, threads=1))
        sequence = decoder.new_sequence(len(IDS))
        rows = []
        for size in (*sizes, len(IDS)):
            part = IDS[sequence.length : sequence.length + size]
            rows += decoder.forward([Step(sequence, part, len(part))])
        decoder.close()
        expected = run(checkpoint, IDS)
        return float(np.sqrt(((np.concatenate(rows) - expected) ** 2).mean() / (expected**2).mean()))

    @pytest.mark.parametrize("head_bits", [4, 8])
    @pytest.mark.parametrize("tied", [True, False])
    @pytest.mark.parametrize("zero", ["fractional", "integer", "middle"])
    def test_zero_points(self, zero: str, tied: bool, head_bits: int, tmp_path: Path) -> None:
        checkpoint = RandomCheckpoint(replace(ARCH, tied_head=tied), blocks(zero, head_bits=head_bits))
        assert self.error(checkpoint, "int4", tmp_path) < NARROW

    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize("group", [16, 32, 64])
    def test_groups(self, group: int, bits: int, tmp_path: Path) -> None:
        checkpoint = RandomCheckpoint(ARCH, blocks("fractional", bits, group=group))
        assert self.error(checkpoint, "int4", tmp_path) < (NARROW if bits == 4 else WIDE)

    @pytest.mark.parametrize("zero", ["fractional", "integer", "middle"])
    def test_four_bits_with_wide_activations(self, zero: str, tmp_path: Path) -> None:
        checkpoint = RandomCheckpoint(ARCH, blocks(zero))
        assert self.error(checkpoint, "int4", tmp_path, new_builder=PreciseOnnxEdgeBuilder) < WIDE

    @pytest.mark.parametrize("weights", ["fp32", "fp16", "int8"])
    @pytest.mark.parametrize("tied", [True, False])
    def test_formats_without_narrow_activations(self, tied: bool, weights: WeightFormat, tmp_path: Path) -> None:
        source = RandomCheckpoint(replace(ARCH, tied_head=tied), blocks("fractional"))
        assert self.error(QuantizedCheckpoint(source, weights), weights, tmp_path) < WIDE

    @pytest.mark.parametrize("weights", ["int8", "int4"])
    def test_quantized_here(self, weights: WeightFormat, tmp_path: Path) -> None:
        checkpoint = QuantizedCheckpoint(RandomCheckpoint(ARCH, blocks("float")), weights)
        assert self.error(checkpoint, weights, tmp_path) < (NARROW if weights == "int4" else WIDE)

    @pytest.mark.parametrize("weights", ["fp32", "int4"])
    @pytest.mark.parametrize("name", VARIANTS)
    def test_variants(self, name: str, weights: WeightFormat, tmp_path: Path) -> None:
        checkpoint = RandomCheckpoint(replace(ARCH, **VARIANTS[name]), blocks("fractional"))
        assert self.error(checkpoint, weights, tmp_path) < (NARROW if weights == "int4" else WIDE)

    @pytest.mark.parametrize("switch", [64, 128])
    def test_a_rope_switch(self, switch: int, tmp_path: Path) -> None:
        rope = replace(ROPE, long_inv_freq=tuple(f / 3 for f in ROPE.inv_freq), long_scale=1.2)
        checkpoint = RandomCheckpoint(replace(ARCH, rope_switch=switch, layers=(Layer(rope), Layer(rope, 9))))
        assert self.error(checkpoint, "fp32", tmp_path) < WIDE
