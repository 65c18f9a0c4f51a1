"""OpenVINO graphs against the plain numpy twin, for every way of storing weights, and what the plugin makes of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from devices.openvino_import import import_openvino
from edge_runtime.errors import StorageError, UnsupportedModel
from exporters.architecture import Rope
from exporters.network import build
from exporters.openvino_builder import OpenVinoBuilder, WeightFormat, pair_order
from exporters.openvino_weights import offset_matrix, to_half
from exporters.weights import QuantizedTensor, Tensor
from tests.exporters.numpy_builder import NumpyBuilder
from tests.exporters.random_checkpoint import ARCHITECTURE, RandomCheckpoint

ov = import_openvino()
IDS = np.random.default_rng(1).integers(0, ARCHITECTURE.vocab_size, 24)


def affine(bits: int, fractional: bool, central: bool = False) -> QuantizedTensor:
    return quantized(
        np.random.default_rng(bits).standard_normal((24, 64)).astype(np.float32), bits, fractional, central
    )


def quantized(values: NDArray[np.float32], bits: int, fractional: bool, central: bool = False) -> QuantizedTensor:
    """Round to groups of 32, with zero points as asked for."""
    rows, cols = values.shape
    blocks = values.reshape(rows, cols // 32, 32)
    top = 2**bits - 1
    low, high = blocks.min(-1), blocks.max(-1)
    if central:
        high = np.maximum(np.abs(low), np.abs(high))
        low = -high
    scale = ((high - low) / top).astype(np.float16).astype(np.float32)
    zero = np.full_like(scale, 2 ** (bits - 1)) if central else -low / scale
    zero = zero if fractional else np.rint(zero)
    codes = np.clip(np.rint(blocks / scale[..., None] + zero[..., None]), 0, top).astype(np.uint8)
    return QuantizedTensor(codes.reshape(rows, cols), scale, zero.astype(np.float32), bits)


def saved(checkpoint: RandomCheckpoint, weights: WeightFormat, folder: Path) -> Path:
    builder = OpenVinoBuilder(checkpoint.architecture, weights, folder)
    build(checkpoint, builder)
    builder.save(folder)
    return folder / "openvino_model.xml"


def run(model: Path, ids: NDArray[np.int64], properties: dict[str, str] | None = None) -> NDArray[np.float32]:
    """(len, vocab) of the stateful graph, in two calls."""
    exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    request = ov.Core().compile_model(str(model), "CPU", {**exact, **(properties or {})}).create_infer_request()
    rows = []
    for start, end in ((0, 10), (10, len(ids))):
        inputs = {
            "input_ids": ids[None, start:end],
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(start, end)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        rows.append(np.array(request.infer(inputs)["logits"][0]))
    return np.concatenate(rows)


def expected(checkpoint: RandomCheckpoint, ids: NDArray[np.int64]) -> NDArray[np.float64]:
    twin = NumpyBuilder(ids)
    build(checkpoint, twin)
    assert twin.logits is not None
    return twin.logits


class TestWeights:
    @pytest.mark.parametrize(("weights", "tolerance"), [("fp32", 1e-4), ("fp16", 2e-2)])
    @pytest.mark.parametrize("tied", [False, True])
    def test_floats(self, weights: WeightFormat, tolerance: float, tied: bool, tmp_path: Path) -> None:
        checkpoint = RandomCheckpoint(replace(ARCHITECTURE, tied_head=tied))
        model = saved(checkpoint, weights, tmp_path)
        np.testing.assert_allclose(run(model, IDS), expected(checkpoint, IDS), atol=tolerance)

    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize("zeros", ["fractional", "integer", "central"])
    def test_codes(self, bits: int, zeros: str, tmp_path: Path) -> None:
        def pack(name: str, values: NDArray[np.float32]) -> Tensor:
            if name == "embed":
                return quantized(values, 8, False, central=True)
            return quantized(values, bits, zeros == "fractional", zeros == "central")

        checkpoint = RandomCheckpoint(replace(ARCHITECTURE, tied_head=True), pack)
        model = saved(checkpoint, "int4" if bits == 4 else "int8", tmp_path)
        reference = expected(checkpoint, IDS)
        np.testing.assert_allclose(run(model, IDS), reference, atol=5e-3 * np.abs(reference).max())

    def test_fractional_zeros_survive_int8_activations(self, tmp_path: Path) -> None:
        """Rounding zero points to integers must be worse than what the offsets leave."""

        def pack(name: str, values: NDArray[np.float32]) -> Tensor:
            return quantized(values, 4, fractional=True)

        def rounded(name: str, values: NDArray[np.float32]) -> Tensor:
            tensor = quantized(values, 4, fractional=True)
            return replace(tensor, zero=tensor.split_zero()[0].astype(np.float32))

        checkpoint = RandomCheckpoint(ARCHITECTURE, pack)
        reference = expected(checkpoint, IDS)
        int8 = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "32"}
        ours = run(saved(checkpoint, "int4", tmp_path), IDS, int8)
        (tmp_path / "rounded").mkdir()
        theirs = run(saved(RandomCheckpoint(ARCHITECTURE, rounded), "int4", tmp_path / "rounded"), IDS, int8)

        def error(logits: NDArray[np.float32]) -> float:
            return float(np.sqrt(np.mean((logits - reference) ** 2)))

        assert error(ours) * 3 < error(theirs)

    def test_quantized_tensors_are_expanded_for_float_formats(self, tmp_path: Path) -> None:
        checkpoint = RandomCheckpoint(ARCHITECTURE, lambda name, values: quantized(values, 4, fractional=True))
        model = saved(checkpoint, "fp32", tmp_path)
        np.testing.assert_allclose(run(model, IDS), expected(checkpoint, IDS), atol=1e-4)

    def test_a_tied_head_is_stored_once(self, tmp_path: Path) -> None:
        sizes = []
        for tied in (False, True):
            folder = tmp_path / str(tied)
            folder.mkdir()
            saved(RandomCheckpoint(replace(ARCHITECTURE, tied_head=tied)), "fp32", folder)
            sizes.append((folder / "openvino_model.bin").stat().st_size)
        table = ARCHITECTURE.vocab_size * ARCHITECTURE.hidden_size * 4
        assert 0 <= sizes[0] - sizes[1] - table < 256  # up to alignment

    def test_four_bits_take_four_bits(self, tmp_path: Path) -> None:
        checkpoint = RandomCheckpoint(
            replace(ARCHITECTURE, layers=ARCHITECTURE.layers[:1], vocab_size=4096),
            lambda name, values: quantized(values, 4, fractional=False, central=True),
        )
        saved(checkpoint, "int4", tmp_path)
        arch = checkpoint.architecture
        matrices = 2 * arch.vocab_size * arch.hidden_size + arch.hidden_size * (
            (arch.num_heads + arch.num_kv_heads) * arch.head_dim * 2 + arch.intermediate_size * 3
        )
        assert (tmp_path / "openvino_model.bin").stat().st_size < matrices * 4.6 / 8 + 8192

    def test_values_beyond_half_precision_are_refused(self) -> None:
        with pytest.raises(UnsupportedModel, match="70000 does not fit float16"):
            to_half(np.array([1.0, -70000.0], np.float32))
        with pytest.raises(UnsupportedModel, match="nan"):
            to_half(np.array([1.0, np.nan], np.float32))

    def test_a_folder_that_cannot_be_written_is_a_storage_error(self, tmp_path: Path) -> None:
        builder = OpenVinoBuilder(ARCHITECTURE, "fp32", tmp_path)
        build(RandomCheckpoint(ARCHITECTURE), builder)
        (tmp_path / "taken").write_text("a file")
        with pytest.raises(StorageError, match="cannot write the OpenVINO model"):
            builder.save(tmp_path / "taken")


class TestOffsets:
    @pytest.mark.parametrize("bits", [4, 8])
    def test_they_are_what_integers_leave_over(self, bits: int) -> None:
        tensor = affine(bits, fractional=True)
        offsets = offset_matrix(tensor)
        assert offsets is not None
        zero, exact = tensor.split_zero()
        assert np.abs(exact).max() > 0.3 * tensor.scale.max()
        np.testing.assert_allclose(offsets.dequantize(), exact, atol=np.abs(exact).max() / 200)
        whole = replace(tensor, zero=zero.astype(np.float32)).dequantize()
        np.testing.assert_allclose(whole + np.repeat(exact, tensor.group, 1), tensor.dequantize(), atol=1e-6)

    def test_there_are_none_for_integers(self) -> None:
        assert offset_matrix(affine(4, fractional=False)) is None


class TestRotation:
    @pytest.mark.parametrize(("dim", "interleaved"), [(16, True), (8, False), (8, True)])
    def test_reordered_channels_give_the_same_logits(self, dim: int, interleaved: bool, tmp_path: Path) -> None:
        rope = Rope(tuple((10_000.0 ** -(np.arange(0, dim, 2) / dim)).tolist()), 1.1, interleaved)
        layers = tuple(replace(layer, rope=rope) for layer in ARCHITECTURE.layers[:2])
        checkpoint = RandomCheckpoint(replace(ARCHITECTURE, layers=layers, qk_norm=True, qkv_bias=True))
        model = saved(checkpoint, "fp32", tmp_path)
        np.testing.assert_allclose(run(model, IDS), expected(checkpoint, IDS), atol=1e-4)

    def test_pairs_lie_half_a_head_apart(self) -> None:
        order = pair_order(Rope((1.0, 0.5), interleaved=True), 8)
        assert order.tolist() == [0, 2, 4, 5, 1, 3, 6, 7]
        order = pair_order(Rope((1.0, 0.5)), 8)
        assert order.tolist() == [0, 1, 4, 5, 2, 3, 6, 7]


def test_the_plugin_recognises_the_patterns(tmp_path: Path) -> None:
    """Fused rotations, norms and stateful attention: without them nothing is wrong but the speed."""
    checkpoint = RandomCheckpoint(ARCHITECTURE)
    compiled = ov.Core().compile_model(str(saved(checkpoint, "fp32", tmp_path)), "CPU")
    kinds = Counter(str(node.get_rt_info()["layerType"].astype(str)) for node in compiled.get_runtime_model().get_ops())
    layers = ARCHITECTURE.num_layers
    assert (kinds["RoPE"], kinds["RMS"], kinds["ScaledDotProductAttention"]) == (2 * layers, 2 * layers + 1, layers)


def test_padding_on_the_left_changes_nothing(tmp_path: Path) -> None:
    """As batches of optimum-intel and the NPU plugin pad."""
    layers = tuple(replace(layer, sliding_window=6) for layer in ARCHITECTURE.layers)
    checkpoint = RandomCheckpoint(replace(ARCHITECTURE, layers=layers))
    exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    request = ov.Core().compile_model(str(saved(checkpoint, "fp32", tmp_path)), "CPU", exact).create_infer_request()
    pad = 5
    mask = np.ones((1, pad + len(IDS)), np.int64)
    mask[0, :pad] = 0
    inputs = {
        "input_ids": np.concatenate([np.zeros(pad, np.int64), IDS])[None],
        "attention_mask": mask,
        "position_ids": np.maximum(np.cumsum(mask, axis=1) - 1, 0),
        "beam_idx": np.zeros(1, np.int32),
    }
    logits = np.array(request.infer(inputs)["logits"][0, pad:])
    np.testing.assert_allclose(logits, expected(checkpoint, IDS), atol=1e-4)
