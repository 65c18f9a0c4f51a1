"""Weight formats against a plain twin: loops instead of vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_runtime.errors import ConfigError, UnsupportedModel
from exporters import quantize as module
from exporters.architecture import Architecture
from exporters.checkpoint import TextFiles
from exporters.network import tensor_names
from exporters.quantize import QuantizedCheckpoint, fitting_group, quantize, widen
from exporters.synthetic import SyntheticCheckpoint
from exporters.weights import QuantizedTensor, Tensor, dequantize
from tests.exporters.numpy_builder import run

RANDOM = np.random.default_rng(7)


def plain_quantize(values: NDArray[np.float32], bits: int, group: int) -> tuple[list[Any], list[Any], list[Any]]:
    """(codes, scale, zero) of one row, a group and a value at a time."""
    codes, scales, zeros = [], [], []
    for start in range(0, len(values), group):
        part = values[start : start + group]
        if bits == 8:
            scale, zero = np.float32(max(abs(part)) / np.float32(127)), 128
        else:
            low, high = min(part.min(), np.float32(0)), max(part.max(), np.float32(0))
            scale = np.float32((high - low) / np.float32(15))
            zero = 0
        scale = scale or np.float32(1)
        if bits == 4:
            zero = int(min(max(np.rint(-low / scale), 0), 15))
        codes += [int(min(max(np.rint(value / scale) + zero, 0), 2**bits - 1)) for value in part]
        scales.append(scale)
        zeros.append(zero)
    return codes, scales, zeros


CASES = {
    "normal": RANDOM.standard_normal((5, 96)),
    "positive": RANDOM.random((4, 64)) + 3,
    "negative": -RANDOM.random((4, 64)) - 3,
    "zeros": np.zeros((2, 32)),
    "one large": np.eye(3, 64) * 1000 + RANDOM.standard_normal((3, 64)) * 1e-3,
    "tiny": RANDOM.standard_normal((2, 32)) * 1e-30,
    "under the smallest": np.full((2, 32), 1e-44),
}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_plain_twin(case: str, bits: int) -> None:
    values = CASES[case].astype(np.float32)
    made = quantize(values, bits, 32)
    assert isinstance(made, QuantizedTensor)
    for row, line in enumerate(values):
        if case == "under the smallest":
            line = np.zeros_like(line)
        codes, scale, zero = plain_quantize(line, bits, 32)
        np.testing.assert_array_equal(made.codes[row], codes)
        np.testing.assert_array_equal(made.scale[row], scale)
        np.testing.assert_array_equal(made.zero[row], zero)


@pytest.mark.parametrize(("bits", "steps"), [(4, 1.0), (8, 0.5)])
def test_error_stays_within_a_step(bits: int, steps: float) -> None:
    values = RANDOM.standard_normal((40, 256)).astype(np.float32)
    made = quantize(values, bits, 64)
    assert isinstance(made, QuantizedTensor)
    error = np.abs(dequantize(made) - values).reshape(40, -1, 64) / made.scale[:, :, None]
    assert error.max() <= steps + 1e-3  # 4 bit: half a step, and half more where the zero point is rounded
    assert error.mean() < 0.3


def test_zero_is_exact_and_zero_points_are_codes() -> None:
    values = RANDOM.standard_normal((8, 64)).astype(np.float32)
    values[:, ::3] = 0
    for bits in (4, 8):
        made = quantize(values, bits, 32)
        assert isinstance(made, QuantizedTensor)
        assert not dequantize(made)[:, ::3].any()
        assert not made.split_zero()[1].any()


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    values = RANDOM.standard_normal((37, 64)).astype(np.float32)
    whole = quantize(values, 4, 32)
    monkeypatch.setattr(module, "_CHUNK_VALUES", 5 * 64)
    parts = quantize(values, 4, 32)
    assert isinstance(whole, QuantizedTensor)
    assert isinstance(parts, QuantizedTensor)
    np.testing.assert_array_equal(whole.codes, parts.codes)
    np.testing.assert_array_equal(whole.scale, parts.scale)


def test_group_that_fits() -> None:
    assert [fitting_group(cols, 128) for cols in (256, 96, 48, 40, 8)] == [128, 32, 16, None, None]
    odd = RANDOM.standard_normal((3, 40)).astype(np.float32)
    assert quantize(odd, 4, 32) is odd


# ---- checkpoints


@dataclass
class Held:
    """A checkpoint out of a dictionary."""

    tensors: dict[str, Tensor]
    architecture: Architecture
    text: TextFiles
    provenance: dict[str, Any]

    def tensor(self, name: str) -> Tensor:
        return self.tensors[name]


@pytest.fixture
def mixed() -> Held:
    """The tiny model with 8-bit embedding, fractional 4-bit q, float rest."""
    base = SyntheticCheckpoint("tiny")
    tensors: dict[str, Tensor] = {name: base.tensor(name) for name in tensor_names(base.architecture)}
    tensors["embed"] = quantize(base.tensor("embed"), 8, 32)
    q = quantize(base.tensor("layers.0.q"), 4, 32)
    assert isinstance(q, QuantizedTensor)
    tensors["layers.0.q"] = QuantizedTensor(q.codes, q.scale, q.zero + np.float32(0.3), 4)
    return Held(tensors, base.architecture, base.text, base.provenance)


def bits_of(tensor: Tensor) -> int:
    return tensor.bits if isinstance(tensor, QuantizedTensor) else 32


@pytest.mark.parametrize(
    ("weights", "embed", "q", "k"), [("fp32", 32, 32, 32), ("fp16", 32, 32, 32), ("int8", 8, 8, 8), ("int4", 8, 4, 4)]
)
def test_formats(mixed: Held, weights: str, embed: int, q: int, k: int) -> None:
    made = QuantizedCheckpoint(mixed, weights)
    found = [bits_of(made.tensor(name)) for name in ("embed", "layers.0.q", "layers.0.k", "layers.0.attn_norm")]
    assert found == [embed, q, k, 32]
    assert made.architecture is mixed.architecture
    assert made.provenance == mixed.provenance


def test_quantized_sources_are_not_rounded_again(mixed: Held) -> None:
    for weights in ("fp32", "int8", "int4"):
        made = QuantizedCheckpoint(mixed, weights)
        for name in ("embed", "layers.0.q"):
            np.testing.assert_allclose(dequantize(made.tensor(name)), dequantize(mixed.tensor(name)), atol=1e-7)
    assert QuantizedCheckpoint(mixed, "int4").tensor("layers.0.q") is mixed.tensor("layers.0.q")


def test_widening_leaves_a_sixteenth_of_the_zero_points_rest(mixed: Held) -> None:
    narrow = mixed.tensor("layers.0.q")
    assert isinstance(narrow, QuantizedTensor)
    wide = widen(narrow)
    inside = (narrow.zero > 0) & (narrow.zero < 15)
    assert np.abs(wide.split_zero()[1][inside]).max() <= 0.5 * wide.scale.max()
    assert widen(wide) is wide


def test_fp16_values_fit_float16(mixed: Held) -> None:
    values = dequantize(QuantizedCheckpoint(mixed, "fp16").tensor("layers.1.down"))
    np.testing.assert_array_equal(values, values.astype(np.float16).astype(np.float32))
    mixed.tensors["layers.1.down"] = np.full((64, 128), 70000, np.float32)
    with pytest.raises(UnsupportedModel, match=r"layers\.1\.down.*70000"):
        QuantizedCheckpoint(mixed, "fp16").tensor("layers.1.down")


def test_head_of_an_untied_model_keeps_eight_bits(mixed: Held) -> None:
    mixed.tensors["head"] = RANDOM.standard_normal((512, 64)).astype(np.float32)
    assert bits_of(QuantizedCheckpoint(mixed, "int4").tensor("head")) == 8


@pytest.mark.parametrize(("weights", "limit"), [("fp32", 1e-9), ("fp16", 0.03), ("int8", 0.3)])
def test_more_bits_stay_nearer(weights: str, limit: float) -> None:
    base = SyntheticCheckpoint("tiny")
    ids = np.arange(30)
    exact = run(base, ids)
    spread = np.sqrt(((run(QuantizedCheckpoint(base, weights), ids) - exact) ** 2).mean())
    assert spread <= limit


@pytest.mark.parametrize(("weights", "group"), [("int3", 32), ("int4", 24), ("int4", 8)])
def test_bad_options(weights: str, group: int) -> None:
    with pytest.raises(ConfigError, match=r"int3|24|8"):
        QuantizedCheckpoint(SyntheticCheckpoint("tiny"), weights, group)
