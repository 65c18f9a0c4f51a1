"""ONNX graphs against the plain twin (tests/exporters/numpy_builder.py), and what their files hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from devices.base import DecoderOptions, Step
from devices.onnxruntime_gqa import OnnxRuntimeDecoder
from edge_runtime.errors import StorageError, UnsupportedModel
from exporters.architecture import Architecture, Layer, Rope
from exporters.checkpoint import TextFiles
from exporters.network import build
from exporters.onnx_builder import OnnxBuilder, WeightFormat
from exporters.onnx_graph import ALIGNMENT, DATA_FILE, MODEL_FILE, OnnxGraph
from exporters.onnx_weights import pack
from exporters.quantize import QuantizedCheckpoint
from exporters.weights import QuantizedTensor, Tensor
from tests.decoder_spec import decoder_spec
from tests.exporters.numpy_builder import run

ROPE = Rope(tuple(10000.0 ** (-i / 16) for i in range(16)))
ARCH = Architecture(
    family="test",
    vocab_size=80,
    hidden_size=128,
    intermediate_size=192,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    max_context=64,
    norm_eps=1e-5,
    layers=(Layer(ROPE), Layer(ROPE, sliding_window=8)),
    attention_scale=32**-0.5,
    tied_head=True,
    qkv_bias=True,
)
IDS = np.random.default_rng(5).integers(0, 80, 40)


class RandomCheckpoint:
    """Float vectors, and matrices as blocks like GGUF's: ``zero`` is "fractional", "integer", "middle" or "float"."""

    def __init__(self, architecture: Architecture, zero: str, group: int = 32, head_bits: int = 8) -> None:
        self.architecture = architecture
        self.text = TextFiles("")
        self.provenance: dict[str, Any] = {}
        self._zero, self._group, self._head_bits = zero, group, head_bits

    def tensor(self, name: str) -> Tensor:
        arch = self.architecture
        rng = np.random.default_rng(list(name.encode()))
        leaf = name.split(".")[-1]
        q_size, kv_size = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
        sizes = {"q": q_size, "k": kv_size, "v": kv_size}
        if leaf == "bias":
            return rng.normal(0, 0.3, sizes[name.split(".")[-2]]).astype(np.float32)
        if "norm" in leaf:
            return rng.normal(1, 0.2, arch.hidden_size).astype(np.float32)
        rows = {"o": arch.hidden_size, "down": arch.hidden_size, "embed": arch.vocab_size, "head": arch.vocab_size}
        rows |= {**sizes, "gate": arch.intermediate_size, "up": arch.intermediate_size}
        columns = {"o": arch.num_heads * arch.head_dim, "down": arch.intermediate_size}.get(leaf, arch.hidden_size)
        return self._matrix(rng, rows[leaf], columns, self._head_bits if leaf in ("embed", "head") else 4)

    def _matrix(self, rng: np.random.Generator, rows: int, columns: int, bits: int) -> Tensor:
        shape = (rows, columns // self._group)
        codes = rng.integers(0, 2**bits, (rows, columns)).astype(np.uint8)
        scale = rng.uniform(0.5, 1.5, shape) / 2**bits * 3 / columns**0.5
        middle = 2 ** (bits - 1)
        zero = middle + rng.uniform(-2, 2, shape)
        if self._zero == "integer":
            zero = np.rint(zero)
        elif self._zero == "middle":
            zero = np.full(shape, middle)
        tensor = QuantizedTensor(codes, scale.astype(np.float32), zero.astype(np.float32), bits)
        return tensor.dequantize() if self._zero == "float" else tensor


def export(checkpoint: RandomCheckpoint | QuantizedCheckpoint, weights: WeightFormat, folder: Path) -> onnx.ModelProto:
    folder.mkdir(exist_ok=True)
    builder = OnnxBuilder(checkpoint.architecture, weights, folder)
    build(checkpoint, builder)
    builder.save(folder)
    return onnx.load(folder / MODEL_FILE, load_external_data=False)


def logits(arch: Architecture, folder: Path) -> NDArray[np.float32]:
    """Of a prompt, a single token and a chunk behind it."""
    spec = decoder_spec(arch, "onnxruntime", folder / MODEL_FILE)
    decoder = OnnxRuntimeDecoder(spec, DecoderOptions(max_sequences=1, threads=1))
    sequence = decoder.new_sequence()
    parts = [decoder.forward([Step(sequence, part, len(part))])[0] for part in (IDS[:30], IDS[30:31], IDS[31:])]
    decoder.close()
    return np.concatenate(parts)


def error(got: NDArray[np.float32], checkpoint: RandomCheckpoint | QuantizedCheckpoint) -> float:
    """Of the logits, root mean square against the twin's, relative."""
    expected = run(checkpoint, IDS)
    return float(np.sqrt(((got - expected) ** 2).mean() / (expected**2).mean()))


def ops(model: onnx.ModelProto) -> set[str]:
    return {node.op_type for node in model.graph.node}


@pytest.mark.parametrize("head_bits", [4, 8])
@pytest.mark.parametrize("tied", [True, False])
def test_fractional_zero_points_keep_their_values(tmp_path: Path, head_bits: int, tied: bool) -> None:
    checkpoint = RandomCheckpoint(replace(ARCH, tied_head=tied), "fractional", head_bits=head_bits)
    export(checkpoint, "int4", tmp_path)
    with_offsets = error(logits(ARCH, tmp_path), checkpoint)
    exact = RandomCheckpoint(replace(ARCH, tied_head=tied), "integer", head_bits=head_bits)
    export(exact, "int4", tmp_path / "integer")
    without = error(logits(ARCH, tmp_path / "integer"), exact)
    # int8 activations are the whole error, with fractional zero points as with integer ones
    assert with_offsets < 0.02
    assert with_offsets < 1.5 * without


@pytest.mark.parametrize("group", [16, 32, 64])
def test_groups(tmp_path: Path, group: int) -> None:
    checkpoint = RandomCheckpoint(ARCH, "fractional", group)
    export(checkpoint, "int4", tmp_path)
    assert error(logits(ARCH, tmp_path), checkpoint) < 0.02


@pytest.mark.parametrize(("weights", "bound"), [("fp32", 1e-5), ("fp16", 1e-3), ("int8", 0.02)])
def test_other_formats(tmp_path: Path, weights: WeightFormat, bound: float) -> None:
    checkpoint = RandomCheckpoint(ARCH, "fractional")
    export(QuantizedCheckpoint(checkpoint, weights), weights, tmp_path)
    assert error(logits(ARCH, tmp_path), checkpoint) < bound


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantized_here(tmp_path: Path, weights: WeightFormat) -> None:
    checkpoint = QuantizedCheckpoint(RandomCheckpoint(ARCH, "float"), weights)
    export(checkpoint, weights, tmp_path)
    assert error(logits(ARCH, tmp_path), checkpoint) < 0.02


def test_nothing_extra_without_offsets(tmp_path: Path) -> None:
    integer = export(RandomCheckpoint(ARCH, "integer"), "int4", tmp_path / "a")
    assert "ReduceSum" not in ops(integer)
    fractional = export(RandomCheckpoint(ARCH, "fractional"), "int4", tmp_path / "b")
    sums = [node for node in fractional.graph.node if node.op_type == "ReduceSum"]
    assert len(sums) == 4 * ARCH.num_layers + 1  # one for each input of projections, whatever reads it; the head's


def test_symmetric_matrices_store_no_zero_points(tmp_path: Path) -> None:
    model = export(RandomCheckpoint(ARCH, "middle"), "int4", tmp_path)
    assert not [tensor.name for tensor in model.graph.initializer if tensor.name.endswith(".zero")]


def test_data_file_is_aligned_and_a_tied_head_stored_once(tmp_path: Path) -> None:
    model = export(RandomCheckpoint(ARCH, "fractional"), "int4", tmp_path)
    places = {}
    for tensor in model.graph.initializer:
        entry = {item.key: item.value for item in tensor.external_data}
        if entry:
            assert entry["location"] == DATA_FILE
            assert int(entry["offset"]) % ALIGNMENT == 0
            places[tensor.name] = int(entry["offset"]), int(entry["length"])
    assert places["embed.codes"] == places["embed.codes.rows"]
    assert max(offset + length for offset, length in places.values()) == (tmp_path / DATA_FILE).stat().st_size
    assert sorted(path.name for path in tmp_path.iterdir()) == [MODEL_FILE, DATA_FILE]


def test_offsets_are_written_to_a_225th_of_the_largest() -> None:
    rng = np.random.default_rng(0)
    zero = (rng.uniform(4, 12, (24, 6))).astype(np.float32)
    tensor = QuantizedTensor(rng.integers(0, 16, (24, 192)).astype(np.uint8), np.ones_like(zero), zero, 4)
    packed = pack(tensor)
    assert packed.zero is not None
    codes = np.stack([packed.codes & 15, packed.codes >> 4], -1).reshape(24, -1, 32).astype(np.float32)
    zeros = np.stack([packed.zero & 15, packed.zero >> 4], -1).reshape(24, -1)[:, : codes.shape[1]]
    values = ((codes - zeros[..., None]) * packed.scale[..., None]).reshape(24, -1)
    first, second = values[:, 192:198], values[:, 198:204]
    offset = tensor.split_zero()[1]
    assert np.abs(first + second / packed.digit_base - offset).max() <= np.abs(offset).max() / 200
    assert not values[:, 204:].any()


def test_a_group_the_engine_lacks_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"embed: .* not 8"):
        export(RandomCheckpoint(ARCH, "integer", group=8), "int4", tmp_path)


def test_values_beyond_fp16_are_refused(tmp_path: Path) -> None:
    builder = OnnxBuilder(ARCH, "fp16", tmp_path)
    with pytest.raises(UnsupportedModel, match="65504"):
        builder.embed(np.full((80, 128), 1e6, np.float32))


def test_an_unfinished_graph_leaves_no_file(tmp_path: Path) -> None:
    graph = OnnxGraph("test", tmp_path)
    graph.weight("w", np.ones(5000, np.float32))
    assert list(tmp_path.iterdir())
    del graph
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        OnnxGraph("test", tmp_path / "file")
    graph = OnnxGraph("test", tmp_path)
    with pytest.raises(StorageError, match="file"):
        graph.save(tmp_path / "file", "test", {})
