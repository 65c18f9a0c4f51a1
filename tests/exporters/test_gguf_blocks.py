"""GGUF block formats against the gguf package's dequantization of the same bytes."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from edge_runtime.errors import CorruptModel, UnsupportedModel
from exporters.gguf_blocks import decode, row_bytes, supported
from exporters.weights import QuantizedTensor

Kind = GGMLQuantizationType
HALVES = {
    # where a block's f16 numbers are
    **{Kind.Q4_0: [0], Kind.Q5_0: [0], Kind.Q8_0: [0], Kind.Q6_K: [208]},
    **{Kind.Q4_1: [0, 2], Kind.Q5_1: [0, 2], Kind.Q4_K: [0, 2], Kind.Q5_K: [0, 2]},
}
FORM = {
    # bits and group of the codes
    **{Kind.Q4_0: (4, 32), Kind.Q4_1: (4, 32), Kind.Q4_K: (4, 32), Kind.Q8_0: (8, 32)},
    **{Kind.Q5_0: (8, 32), Kind.Q5_1: (8, 32), Kind.Q5_K: (8, 32), Kind.Q6_K: (8, 16)},
}


def _random_blocks(kind: Kind, rows: int, blocks: int) -> NDArray[np.uint8]:
    """Any bits, with scales of a sane size; a few scales are zero."""
    rng = np.random.default_rng(int(kind))
    size = GGML_QUANT_SIZES[kind][1]
    raw = rng.integers(0, 256, (rows * blocks, size), np.uint8)
    for at in HALVES[kind]:
        halves = (rng.standard_normal(rows * blocks) / 16).astype(np.float16)
        halves[:: 7 + at] = 0
        raw[:, at : at + 2] = halves.view(np.uint8).reshape(-1, 2)
    return raw.reshape(rows, blocks * size)


@pytest.mark.parametrize("kind", HALVES, ids=lambda kind: kind.name)
def test_quantized(kind: Kind) -> None:
    raw = _random_blocks(kind, 6, 5)
    tensor = decode(raw, kind, "w")
    assert isinstance(tensor, QuantizedTensor)
    assert (tensor.bits, tensor.group) == FORM[kind]
    assert int(tensor.codes.max()) < 2**tensor.bits
    wanted = gguf.quants.dequantize(raw, kind)
    bound = float(np.abs(wanted).max())
    np.testing.assert_allclose(tensor.dequantize(), wanted, rtol=1e-6, atol=4e-7 * bound)

    some = decode(raw[2:5], kind, "w")
    np.testing.assert_array_equal(some.dequantize(), tensor.dequantize()[2:5])


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0], ids=lambda kind: kind.name)
def test_of_real_weights(kind: Kind) -> None:
    values = np.random.default_rng(0).standard_normal((16, 128)).astype(np.float32)
    raw = gguf.quants.quantize(values, kind)
    tensor = decode(raw, kind, "w")
    assert isinstance(tensor, QuantizedTensor)
    np.testing.assert_allclose(tensor.dequantize(), gguf.quants.dequantize(raw, kind), rtol=1e-6, atol=1e-6)
    zero, offset = tensor.split_zero()
    if kind in (Kind.Q4_0, Kind.Q5_0, Kind.Q8_0):  # whole zero points: nothing is left over
        assert not offset.any()
        np.testing.assert_array_equal(zero, tensor.zero)


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16], ids=lambda kind: kind.name)
def test_plain(kind: Kind) -> None:
    values = np.random.default_rng(0).standard_normal((4, 40)).astype(np.float32)
    raw = np.ascontiguousarray(gguf.quants.quantize(values, kind)).view(np.uint8)
    tensor = decode(raw, kind, "w")
    assert isinstance(tensor, np.ndarray)
    assert tensor.dtype == np.float32
    np.testing.assert_array_equal(tensor, gguf.quants.dequantize(raw, kind))


@pytest.mark.parametrize("kind", [Kind.Q4_1, Kind.Q5_1], ids=lambda kind: kind.name)
def test_constant_block_is_exact(kind: Kind) -> None:
    """Scale 0: every weight is the minimum, whatever the codes are."""
    raw = _random_blocks(kind, 1, 3)
    raw.reshape(3, -1)[1, 0:4] = np.array([0.0, -0.3], np.float16).view(np.uint8)
    tensor = decode(raw, kind, "w")
    np.testing.assert_array_equal(tensor.dequantize()[0, 32:64], np.full(32, np.float16(-0.3), np.float32))


def test_all_formats_are_tested() -> None:
    assert set(supported()) == {kind.name for kind in (Kind.F32, Kind.F16, Kind.BF16, *HALVES)}


def test_refusals() -> None:
    with pytest.raises(UnsupportedModel, match=r"blk\.0\.ffn_up\.weight.*IQ4_NL"):
        decode(np.zeros((1, 18), np.uint8), Kind.IQ4_NL, "blk.0.ffn_up.weight")
    with pytest.raises(CorruptModel, match="not finite"):
        decode(np.full((1, 34), 0x7C, np.uint8), Kind.Q8_0, "w")
    with pytest.raises(CorruptModel, match="whole Q4_K blocks of 256"):
        row_bytes(96, Kind.Q4_K, "w")
