"""The layout of our CPU kernels against a plain twin: its bytes read one value at a time, as the format says."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from exporters import edge_weights as module
from exporters.edge_weights import PackedMatrix, pack, pack_half
from exporters.quantize import quantize, widen
from exporters.weights import QuantizedTensor

Constants = tuple[NDArray[np.float64], NDArray[np.float64]]


def affine(rows: int, columns: int, bits: int, group: int, seed: int = 0) -> QuantizedTensor:
    """Any codes, with scales over some powers of two and zero points that are fractions."""
    rng = np.random.default_rng(seed)
    shape = (rows, columns // group)
    codes = rng.integers(0, 2**bits, (rows, columns)).astype(np.uint8)
    scale = (2.0 ** rng.uniform(-6, 2, shape)).astype(np.float32)
    return QuantizedTensor(codes, scale, rng.uniform(0, 2**bits - 1, shape).astype(np.float32), bits)


def unpack(packed: PackedMatrix) -> tuple[NDArray[np.int64], Constants]:
    """Codes (rows, columns) as the kernels see them, and (d, m), both (rows, blocks); rows are whole panels'."""
    data, block = packed.data.tobytes(), packed.block
    rows, blocks = -(-packed.rows // 16) * 16, packed.columns // block
    code_bytes = block * 16 if packed.bits == 8 else block * 8
    size = code_bytes + (64 if packed.offsets else 32)
    assert len(data) == rows // 16 * blocks * size
    codes = np.zeros((rows, packed.columns), np.int64)
    d, m = np.zeros((rows, blocks)), np.zeros((rows, blocks))
    for row in range(rows):
        for index in range(blocks):
            start = (row // 16 * blocks + index) * size
            lane = row % 16
            for k in range(block):
                if packed.bits == 8:
                    byte = data[start + k // 4 * 64 + lane * 4 + k % 4]
                    code = byte - 256 if byte > 127 else byte
                else:
                    k2 = k % (block // 2)
                    byte = data[start + k2 // 4 * 64 + lane * 4 + k2 % 4]
                    code = byte & 15 if k < block // 2 else byte >> 4
                codes[row, index * block + k] = code
            constants = start + code_bytes
            d[row, index] = np.frombuffer(data, "<f2", 1, constants + lane * 2)[0]
            if packed.offsets:
                m[row, index] = np.frombuffer(data, "<f2", 1, constants + 32 + lane * 2)[0]
    return codes, (d, m)


def constants(tensor: QuantizedTensor, block: int) -> Constants:
    """What ``d`` and ``m`` should be before they are rounded, (rows, blocks)."""
    scale = tensor.scale.astype(np.float64).repeat(tensor.group // block, 1)
    zero = tensor.zero.astype(np.float64).repeat(tensor.group // block, 1)
    return scale, scale * ((0 if tensor.bits == 4 else 128) - zero)


@settings(max_examples=40)
@given(
    rows=st.integers(1, 50),
    groups=st.integers(1, 3),
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([16, 32, 64, 96, 128]),
    seed=st.integers(0, 2**32 - 1),
)
def test_agrees_with_the_plain_twin(rows: int, groups: int, bits: int, group: int, seed: int) -> None:
    tensor = affine(rows, groups * group, bits, group, seed)
    packed = pack(tensor)
    assert packed.data.dtype == np.uint8
    assert (packed.rows, packed.columns, packed.bits) == (rows, groups * group, bits)
    assert packed.block == min(group, 32)
    codes, found = unpack(packed)
    np.testing.assert_array_equal(codes[:rows], tensor.codes.astype(np.int64) - (0 if bits == 4 else 128))
    assert not codes[rows:].any()
    for made, exact in zip(found, constants(tensor, packed.block), strict=True):
        np.testing.assert_array_equal(made[:rows], exact.astype(np.float16))
        np.testing.assert_allclose(made[:rows], exact, rtol=2**-11, atol=2**-25)
        assert not made[rows:].any()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [16, 32, 128])
def test_values_are_kept_but_for_the_rounding_of_two_constants(bits: int, group: int) -> None:
    tensor = affine(23, 256, bits, group)
    packed = pack(tensor)
    codes, (d, m) = unpack(packed)
    product, offset = codes * d.repeat(packed.block, 1), m.repeat(packed.block, 1)
    error = np.abs(product + offset - np.pad(tensor.dequantize(), ((0, 9), (0, 0))))
    assert (error <= (np.abs(product) + np.abs(offset)) * 2.0**-10 + 1e-6).all()


def test_blocks_of_gguf_are_carried_over_exactly() -> None:
    """Their constants are float16 already: Q4_1 is d · q + m, Q8_0 d · q."""
    rng = np.random.default_rng(1)
    d = rng.uniform(0.01, 0.1, (20, 3)).astype(np.float16).astype(np.float32)
    minimum = rng.uniform(-1, 0.2, (20, 3)).astype(np.float16).astype(np.float32)
    codes = rng.integers(0, 16, (20, 96)).astype(np.uint8)
    _, (scale, offset) = unpack(pack(QuantizedTensor(codes, d, -minimum / d, 4)))
    np.testing.assert_array_equal(scale[:20], d)
    np.testing.assert_array_equal(offset[:20], minimum)
    _, (scale, offset) = unpack(pack(QuantizedTensor(codes, d, np.full_like(d, 128), 8)))
    np.testing.assert_array_equal(scale[:20], d)
    assert not offset.any()


@pytest.mark.parametrize("quantized_as", ["int4", "int8", "widened"])
def test_what_the_exporter_makes(quantized_as: str) -> None:
    values = np.random.default_rng(2).standard_normal((40, 192)).astype(np.float32)
    values[3, 32:64] = 0
    tensor = quantize(values, 8 if quantized_as == "int8" else 4, 64)
    assert isinstance(tensor, QuantizedTensor)
    packed = pack(widen(tensor) if quantized_as == "widened" else tensor)
    codes, (d, m) = unpack(packed)
    made = (codes * d.repeat(32, 1) + m.repeat(32, 1))[:40]
    np.testing.assert_allclose(made, tensor.dequantize(), atol=2**-10 * np.abs(values).max())
    if quantized_as == "int8":
        assert not m.any()
        assert not made[3, 32:64].any()


@pytest.mark.parametrize("bits", [4, 8])
def test_chunks_do_not_show(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = affine(75, 64, bits, 32)
    whole = pack(tensor).data
    for values in (1, 2 * 16 * 64):
        monkeypatch.setattr(module, "_CHUNK_VALUES", values)
        np.testing.assert_array_equal(pack(tensor).data, whole)


def test_temporaries_stay_small() -> None:
    """An embedding must not be in memory a third time."""
    tensor = affine(8192, 2048, 8, 32)
    tracemalloc.start()
    packed = pack(tensor)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak - packed.data.nbytes < 6 * module._CHUNK_VALUES


def test_groups_without_a_kernel_are_refused() -> None:
    for group in (8, 24, 48):
        with pytest.raises(ValueError, match=f"groups of 16 columns or of a multiple of 32, not {group}"):
            pack(affine(4, group * 2, 4, group))


@pytest.mark.parametrize("bits", [4, 8])
def test_constants_beyond_float16_are_refused(bits: int) -> None:
    tensor = affine(20, 64, bits, 32)
    large = tensor.scale.copy()
    large[17, 1] = 70000
    with pytest.raises(ValueError, match=r"its largest scale, 70000, is over float16's largest, 65504"):
        pack(QuantizedTensor(tensor.codes, large, tensor.zero, bits))
    large[17, 1] = 60000
    zero = np.full_like(tensor.zero, 10)
    with pytest.raises(ValueError, match=r"its largest offset, (600000|7.08e\+06), is over float16's largest, 65504"):
        pack(QuantizedTensor(tensor.codes, large, zero, bits))


@pytest.mark.parametrize(("rows", "columns"), [(1, 16), (16, 48), (37, 64)])
def test_float16_lies_in_panels(rows: int, columns: int) -> None:
    values = np.random.default_rng(3).standard_normal((rows, columns)).astype(np.float16)
    packed = pack_half(values)
    assert (packed.rows, packed.columns, packed.bits, packed.offsets) == (rows, columns, 16, False)
    data = packed.data.view(np.float16)
    whole = -(-rows // 16) * 16
    assert data.size == whole * columns
    for row in range(whole):
        for column in range(columns):
            found = data[(row // 16 * columns + column) * 16 + row % 16]
            assert found == (values[row, column] if row < rows else 0)


def test_float16_of_other_columns_is_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 16 columns of float16, not 24"):
        pack_half(np.zeros((16, 24), np.float16))
