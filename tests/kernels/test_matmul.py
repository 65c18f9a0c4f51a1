"""Products of packed matrices against the plain twin in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from exporters.edge_weights import PackedMatrix, pack, pack_half
from exporters.weights import QuantizedTensor, Tensor, dequantize, is_half
from tests.kernels.operators import matmul, run

SHAPES = [(bits, group, activation) for bits, activation in ((4, 8), (4, 16), (8, 16)) for group in (16, 32, 64)]
SHAPES.append((16, 16, 32))  # float16, whatever the group


def matrix(rows: int, columns: int, bits: int, group: int, seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    if bits == 16:
        return rng.normal(0, 1, (rows, columns)).astype(np.float16)
    return quantized(rows, columns, bits, group, rng)


def quantized(rows: int, columns: int, bits: int, group: int, rng: np.random.Generator) -> QuantizedTensor:
    shape = (rows, columns // group)
    codes = rng.integers(0, 2**bits, (rows, columns)).astype(np.uint8)
    # constants that float16 holds, so that the twin has the very same
    scale = rng.uniform(0.5, 1.5, shape).astype(np.float16).astype(np.float32) / 2**bits
    zero = np.float32(2 ** (bits - 1)) + rng.integers(-8, 9, shape).astype(np.float32) / 4
    return QuantizedTensor(codes, scale, zero, bits)


def rounded(blocks: NDArray[np.float32], bits: int) -> NDArray[np.float64]:
    """To whole multiples of one step for each block."""
    top = np.float32(2 ** (bits - 1) - 1)
    largest = np.abs(blocks).max(-1, keepdims=True)
    factor = np.divide(top, largest, out=np.zeros_like(largest), where=largest > 0)
    codes: NDArray[np.float64] = np.rint(blocks * factor).astype(np.float64)
    return codes * (largest / top)


def packed(tensor: Tensor) -> PackedMatrix:
    return pack_half(tensor) if is_half(tensor) else pack(as_codes(tensor))


def as_codes(tensor: Tensor) -> QuantizedTensor:
    assert isinstance(tensor, QuantizedTensor)
    return tensor


def twin(x: NDArray[np.float32], tensor: Tensor, activation_bits: int) -> NDArray[np.float64]:
    """x·Wᵀ with the activations rounded as the kernels round them."""
    if is_half(tensor):
        return x.astype(np.float64) @ tensor.astype(np.float64).T
    tensor = as_codes(tensor)
    block = 32 if tensor.group % 32 == 0 else 16
    blocks = x.reshape(len(x), -1, block)
    if (tensor.bits, activation_bits) == (4, 16):  # two digits of 8 bits
        first = rounded(blocks, 8)
        values = first + rounded((blocks - first).astype(np.float32), 8)
    else:
        values = rounded(blocks, activation_bits)
    middle = 0 if tensor.bits == 4 else 128
    repeat = tensor.group // block
    scale = tensor.scale.repeat(repeat, 1).astype(np.float16).astype(np.float64)
    offset = (tensor.scale * (middle - tensor.zero)).repeat(repeat, 1).astype(np.float16).astype(np.float64)
    weights = (tensor.codes.astype(np.float64) - middle).reshape(len(tensor.codes), -1, block)
    main = np.einsum("tbk,nbk,nb->tn", values, weights, scale)
    return main + values.sum(-1) @ offset.T


def activations(tokens: int, columns: int) -> NDArray[np.float32]:
    rng = np.random.default_rng(tokens)
    x = rng.normal(0, 1, (tokens, columns)).astype(np.float32)
    x[:, 5] *= 40  # an outlier, as models have them
    x[0, :16] = 0
    return x


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 7, 8, 9, 33])
@pytest.mark.parametrize(("bits", "group", "activation"), SHAPES)
def test_agrees_with_the_plain_twin(bits: int, group: int, activation: int, tokens: int) -> None:
    tensor = matrix(37, 192, bits, group)
    x = activations(tokens, 192)
    expected = twin(x, tensor, activation)
    np.testing.assert_allclose(
        matmul(x, packed(tensor), activation), expected, rtol=0, atol=2e-6 * np.abs(expected).max()
    )


@pytest.mark.parametrize(("bits", "group", "activation"), SHAPES)
def test_a_row_does_not_depend_on_the_others(bits: int, group: int, activation: int) -> None:
    tensor = packed(matrix(50, 320, bits, group))
    x = activations(23, 320)
    together = matmul(x, tensor, activation)
    alone = np.concatenate([matmul(row[None], tensor, activation) for row in x])
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("tokens", [1, 3, 9])
@pytest.mark.parametrize("group", [16, 32, 64])
def test_a_matrix_without_offsets(group: int, tokens: int) -> None:
    affine = as_codes(matrix(37, 192, 8, group))
    tensor = replace(affine, zero=np.full_like(affine.zero, 128))
    made, x = pack(tensor), activations(tokens, 192)
    assert not made.offsets
    expected = twin(x, tensor, 16)
    np.testing.assert_allclose(matmul(x, made, 16), expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    attributes = {"K": 192, "N": 37, "bits": 8, "block": made.block, "offsets": 0}
    rows = run("QuantizedGather", {"ids": np.array([36, 0]), "weight": made.data}, **attributes)
    np.testing.assert_allclose(rows, tensor.dequantize()[[36, 0]], rtol=1e-6)


def test_the_largest_sums_fit() -> None:
    """Every code and activation at its extreme: integer sums are as large as they get."""
    for bits, activation in ((4, 8), (4, 16), (8, 16)):
        codes = np.full((16, 64), 2**bits - 1, np.uint8)
        low = QuantizedTensor(np.zeros_like(codes), np.ones((16, 2), np.float32), np.zeros((16, 2), np.float32), bits)
        high = QuantizedTensor(codes, low.scale, low.zero, bits)
        for tensor in (low, high):
            for sign in (1, -1):
                x = np.full((3, 64), sign, np.float32)
                expected = x @ tensor.dequantize().T
                np.testing.assert_allclose(matmul(x, pack(tensor), activation), expected, rtol=1e-6)


def test_bias() -> None:
    bias = np.random.default_rng(1).normal(0, 1, 37).astype(np.float32)
    for bits, activation in ((4, 16), (16, 32)):
        tensor, x = packed(matrix(37, 64, bits, 32)), activations(3, 64)
        np.testing.assert_allclose(matmul(x, tensor, activation, bias), matmul(x, tensor, activation) + bias, rtol=1e-6)


@pytest.mark.parametrize(("bits", "group", "activation"), SHAPES)
def test_a_norm_in_front(bits: int, group: int, activation: int) -> None:
    tensor, x = matrix(37, 192, bits, group), activations(9, 192)
    weight = np.random.default_rng(2).uniform(0.5, 1.5, 192).astype(np.float32)
    normed = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-3) * weight
    expected = twin(normed.astype(np.float32), tensor, activation)
    y = matmul(x, packed(tensor), activation, norm=weight, epsilon=1e-3)
    # the norms differ in their last place, so that a code here and there is the one beside it
    assert np.linalg.norm(y - expected) < {8: 1e-3, 16: 1e-5, 32: 1e-6}[activation] * np.linalg.norm(expected)
    alone = [matmul(row[None], packed(tensor), activation, norm=weight, epsilon=1e-3) for row in x]
    np.testing.assert_array_equal(np.concatenate(alone), y)


@pytest.mark.parametrize("gate", [0, 1, 2])
@pytest.mark.parametrize(("bits", "group", "activation"), SHAPES)
def test_a_gate_in_front(bits: int, group: int, activation: int, gate: int) -> None:
    tensor, x = packed(matrix(37, 192, bits, group)), activations(9, 2 * 192)
    gated = run("GatedUnit", {"x": x}, activation=gate)
    np.testing.assert_array_equal(matmul(x, tensor, activation, gate=gate), matmul(gated, tensor, activation))


def test_an_addend_behind() -> None:
    tensor, x = packed(matrix(37, 64, 4, 32)), activations(6, 64)
    bias, addend = np.random.default_rng(1).normal(0, 1, (7, 37)).astype(np.float32)[0], activations(6, 37)
    both = matmul(x, tensor, 8, bias, addend=addend)
    np.testing.assert_array_equal(both, matmul(x, tensor, 8, bias) + addend)
    np.testing.assert_array_equal(matmul(x, tensor, 8, addend=addend), matmul(x, tensor, 8) + addend)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"norm": np.ones(32, np.float32)}, r"norm must be \(K\)"),
        ({"addend": np.ones((3, 16), np.float32)}, r"addend must be \(tokens, N\)"),
        ({"bias": np.ones(15, np.float32)}, r"bias must be \(N\)"),
        ({"gate": 0}, r"x must be \(tokens, K\), or \(tokens, 2"),
        ({"gate": 3}, "gate must be"),
    ],
)
def test_wrong_companions_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        matmul(activations(2, 64), packed(matrix(16, 64, 4, 32)), 8, **given)


@pytest.mark.parametrize("value", [0.0, 1e-42, 1e-30, 3e38])
def test_extreme_activations(value: float) -> None:
    tensor = packed(matrix(16, 32, 4, 32))
    y = matmul(np.full((1, 32), value, np.float32), tensor, 8)
    assert np.isfinite(y).all() or value == 3e38
    if value == 0.0:
        assert (y == 0).all()


def test_no_tokens() -> None:
    assert matmul(np.zeros((0, 64), np.float32), packed(matrix(20, 64, 4, 32)), 8).shape == (0, 20)


@pytest.mark.parametrize(("bits", "group"), [(4, 16), (4, 32), (8, 16), (8, 64), (16, 16)])
def test_rows_of_a_table(bits: int, group: int) -> None:
    tensor = matrix(53, 128, bits, group)
    made, ids = packed(tensor), np.array([0, 52, 16, 15, 31])
    attributes = {"K": 128, "N": 53, "bits": bits, "block": made.block}
    y = run("QuantizedGather", {"ids": ids, "weight": made.data}, **attributes)
    expected = dequantize(tensor)[ids]
    np.testing.assert_allclose(y, expected, atol=2**-10 * np.abs(expected).max(), rtol=0)  # of the constants' float16
    with pytest.raises(Exception, match="outside the table"):
        run("QuantizedGather", {"ids": np.array([53]), "weight": made.data}, **attributes)


def test_a_weight_of_another_size_is_refused() -> None:
    made = packed(matrix(16, 64, 4, 32))
    with pytest.raises(Exception, match="not the size of its matrix"):
        run(
            "QuantizedMatMul",
            {"x": activations(1, 64), "weight": made.data[:-1].copy()},
            K=64,
            N=16,
            bits=4,
            block=32,
            activation_bits=8,
        )


@pytest.mark.parametrize(("rows", "columns"), [(2**59, 128), (16, 2**59), (2**30, 2**31)])
def test_sizes_that_overflow_are_refused(rows: int, columns: int) -> None:
    """2**59 · 128 columns take 2**64 bytes and a few, which a weight of those few would pass for."""
    attributes = {"K": columns, "N": rows, "bits": 4, "block": 32}
    with pytest.raises(Exception, match=r"at most 2\^28"):
        run("QuantizedGather", {"ids": np.array([2**40]), "weight": np.zeros(0, np.uint8)}, **attributes)


def test_attributes_are_checked() -> None:
    wrong = ((8, 8, "4-bit weights only"), (16, 16, "no others"), (8, 32, "float16 weights only"))
    for bits, activation, words in wrong:
        with pytest.raises(Exception, match=words):
            matmul(activations(1, 64), packed(matrix(16, 64, bits, 32)), activation)
    with pytest.raises(Exception, match="bits must be 4, 8 or 16"):
        matmul(activations(1, 64), replace(packed(matrix(16, 64, 8, 32)), bits=2), 16)
