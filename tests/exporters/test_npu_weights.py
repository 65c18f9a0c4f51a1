"""Weights as the NPU takes them: what is rounded how, and in which layouts it stands in the file."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from devices.openvino_import import import_openvino
from edge_runtime.errors import ConfigError
from edge_runtime.package import Package
from exporters import npu_weights
from exporters.export import export
from exporters.graphs import write_graph
from exporters.npu_weights import GROUP, NpuCheckpoint, symmetric
from exporters.quantize import quantize
from exporters.synthetic import SyntheticCheckpoint
from exporters.weights import QuantizedTensor, dequantize
from tests.exporters.random_checkpoint import ARCHITECTURE, RandomCheckpoint

WIDE = replace(ARCHITECTURE, hidden_size=256, intermediate_size=192, num_heads=8)
"""128 divides the columns of all but ``down``."""


def normal(rows: int = 8, cols: int = 256) -> NDArray[np.float32]:
    return np.random.default_rng(3).standard_normal((rows, cols)).astype(np.float32)


class TestSymmetric:
    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize("group", [128, 256])
    def test_to_the_nearest(self, bits: int, group: int) -> None:
        values = normal()
        tensor = symmetric(values, bits, group)
        assert tensor.group == group
        assert np.all(tensor.zero == 2 ** (bits - 1))
        step = np.repeat(np.abs(tensor.scale), group, 1)
        highest = (2 ** (bits - 1) - 1) * step  # against the sign of the largest
        reachable = np.abs(values) <= highest + step / 2
        error = np.abs(tensor.dequantize().astype(np.float64) - values)
        assert np.all(error[reachable] <= step[reachable] * 0.5001)
        assert np.all(error <= step * 1.01)
        assert reachable.mean() > 0.98

    def test_the_largest_becomes_the_lowest_code(self) -> None:
        values = normal()
        tensor = symmetric(values, 4, 128)
        grouped, codes = values.reshape(8, 2, 128), tensor.codes.reshape(8, 2, 128)
        largest = np.abs(grouped).argmax(-1, keepdims=True)
        assert np.all(np.take_along_axis(codes, largest, -1) == 0)
        assert np.array_equal(np.sign(tensor.scale), -np.sign(np.take_along_axis(grouped, largest, -1)[..., 0]))
        assert np.array_equal(tensor.scale, tensor.scale.astype(np.float16))

    def test_what_is_on_the_grid_stays(self) -> None:
        codes = np.random.default_rng(0).integers(0, 16, (4, 128))
        codes[:, 5] = 0
        values = ((codes - 8) * np.float32(0.25)).astype(np.float32)
        assert np.array_equal(symmetric(values, 4, 128).dequantize(), values)

    def test_zeros_and_what_is_too_small_for_float16(self) -> None:
        values = np.stack([np.zeros(128), np.full(128, 1e-12)]).astype(np.float32)
        assert not np.any(symmetric(values, 4, 128).dequantize())

    def test_a_quantized_source(self) -> None:
        source = quantize(normal(), 4, 32)
        assert isinstance(source, QuantizedTensor)
        ours, again = symmetric(source, 4, 128), symmetric(dequantize(source), 4, 128)
        assert np.array_equal(ours.codes, again.codes)
        assert np.array_equal(ours.scale, again.scale)

    def test_many_rows_are_as_few(self, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = symmetric(normal(), 4, 128)
        monkeypatch.setattr(npu_weights, "_CHUNK_VALUES", 3 * 256)
        parts = symmetric(normal(), 4, 128)
        assert np.array_equal(whole.codes, parts.codes)
        assert np.array_equal(whole.scale, parts.scale)


class TestCheckpoint:
    def test_groups_and_whole_rows(self) -> None:
        checkpoint = NpuCheckpoint(RandomCheckpoint(WIDE), "int4")
        found = {name: checkpoint.tensor(name) for name in ("embed", "head", "layers.0.q", "layers.7.down", "norm")}
        formats = {name: (t.bits, t.group) for name, t in found.items() if isinstance(t, QuantizedTensor)}
        assert formats == {
            "embed": (8, 256),
            "head": (8, 256),
            "layers.0.q": (4, GROUP),
            "layers.7.down": (8, 192),
        }

    def test_large_models_have_whole_rows_of_4_bits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(npu_weights, "GROUPED_UP_TO", 1000)
        checkpoint = NpuCheckpoint(RandomCheckpoint(WIDE), "int4")
        for name, cols in (("layers.0.q", 256), ("layers.7.down", 192)):
            tensor = checkpoint.tensor(name)
            assert isinstance(tensor, QuantizedTensor)
            assert (tensor.bits, tensor.group) == (4, cols)

    def test_fp16(self) -> None:
        base = RandomCheckpoint(WIDE, lambda name, values: quantize(values, 4, 32))
        tensor = NpuCheckpoint(base, "fp16").tensor("layers.0.q")
        assert np.array_equal(tensor, dequantize(base.tensor("layers.0.q")).astype(np.float16))

    @pytest.mark.parametrize("weights", ["fp32", "int8", "int3"])
    def test_other_formats_are_refused(self, weights: str) -> None:
        with pytest.raises(ConfigError, match=f"the NPU takes weights as int4 or fp16, not {weights}"):
            NpuCheckpoint(RandomCheckpoint(WIDE), weights)


def test_layouts_in_the_file(tmp_path: Path) -> None:
    """As NPUW's patterns want them: (rows, groups, 128) i4, (rows, columns) i8, no zero points."""
    checkpoint = NpuCheckpoint(RandomCheckpoint(WIDE), "int4")
    engine, file = write_graph(checkpoint, "openvino-npu", "int4", tmp_path, tmp_path)
    assert (engine, file) == ("openvino-npu", "openvino_model.xml")
    model = import_openvino().Core().read_model(str(tmp_path / file))
    constants = [node for node in model.get_ops() if node.get_type_name() == "Constant"]
    shapes = [(node.get_element_type().get_type_name(), tuple(node.get_output_shape(0))) for node in constants]
    kinds = Counter((name, len(shape)) for name, shape in shapes)
    layers = WIDE.num_layers
    assert kinds["i4", 3] == 2 * layers  # qkv, gate and up
    assert kinds["i4", 2] == layers  # o, whose one group is the whole row
    assert kinds["i8", 2] == layers + 2  # down, embedding, head
    assert {shape[-1] for name, shape in shapes if name == "i4"} == {GROUP}
    assert not {"u4", "u8"} & {name for name, _ in kinds}
    assert "past_key_values.0.keypresent.0.key" in {node.get_variable_id() for node in model.get_sinks()}
    assert {parameter.get_friendly_name() for parameter in model.get_parameters()} == {
        "input_ids",
        "attention_mask",
        "position_ids",
        "beam_idx",
    }


def test_beside_another_engine_in_a_package(tmp_path: Path) -> None:
    folder = tmp_path / "package"
    source = SyntheticCheckpoint("tiny")
    export(source, folder, ["openvino", "openvino-npu"], "int4")
    package = Package.open(folder)
    assert {variant.name: variant.engine for variant in package.manifest.variants} == {
        "openvino-int4": "openvino",
        "openvino-npu-int4": "openvino-npu",
    }
    with pytest.raises(ConfigError, match="not int8"):
        export(source, folder, ["openvino-npu"], "int8")
    assert len(Package.open(folder).manifest.variants) == 2
