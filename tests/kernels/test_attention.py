"""Attention over the paged cache, and gates, against the plain twin in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.kernels.operators import Arrays, run

BLOCK = 32
LAYERS = 2


@dataclass
class Case:
    heads: int = 6
    kv_heads: int = 2
    dim: int = 64
    rotary: int = 64
    interleaved: bool = False
    window: int = 0
    softcap: float = 0.0
    norms: bool = False
    codes: bool = False
    """The cache holds 8-bit codes with scales, else float16."""
    sequences: list[NDArray[np.float32]] = field(default_factory=list)
    """Per sequence (length, (heads + 2·kv_heads)·dim): everything it will ever hold."""

    def __post_init__(self) -> None:
        rng = np.random.default_rng(3)
        self.cos = rng.normal(0, 1, (700, self.rotary // 2)).astype(np.float32)
        self.sin = rng.normal(0, 1, (700, self.rotary // 2)).astype(np.float32)
        self.q_norm, self.k_norm = rng.uniform(0.5, 1.5, (2, self.dim)).astype(np.float32)

    def add(self, length: int) -> None:
        rng = np.random.default_rng(length)
        self.sequences.append(
            rng.normal(0, 1, (length, (self.heads + 2 * self.kv_heads) * self.dim)).astype(np.float32)
        )

    def cache(self) -> NDArray[np.uint8]:
        """With rubbish in it, as blocks have that were used before: also what is no number."""
        blocks = sum(-(-len(each) // BLOCK) for each in self.sequences) + 3
        rng = np.random.default_rng(0)
        size = self.dim + 4 if self.codes else 2 * self.dim
        return rng.integers(0, 256, (blocks, LAYERS, 2, self.kv_heads, BLOCK * size)).astype(np.uint8)

    def tables(self) -> NDArray[np.int32]:
        """Blocks in no order, each in one table."""
        needed = [-(-len(each) // BLOCK) for each in self.sequences]
        free = np.random.default_rng(1).permutation(sum(needed) + 3)
        tables = np.zeros((len(needed), max(needed) + 1), np.int32)
        for index, count in enumerate(needed):
            tables[index, :count], free = free[:count], free[count:]
        return tables

    def forward(self, cache: NDArray[np.uint8], parts: list[tuple[int, int, int]]) -> list[NDArray[np.float32]]:
        """Run tokens start … stop of some sequences, given as (sequence, start, stop)."""
        tables = self.tables()
        counts = [stop - start for _, start, stop in parts]
        inputs: Arrays = {
            "qkv": np.concatenate([self.sequences[s][start:stop] for s, start, stop in parts]),
            "cache": cache,
            "begins": np.cumsum([0, *counts], dtype=np.int32),
            "past": np.array([start for _, start, _ in parts], np.int32),
            "table": np.ascontiguousarray(tables[[s for s, _, _ in parts]]),
            "positions": np.concatenate([np.arange(start, stop) for _, start, stop in parts]),
            "cos": self.cos,
            "sin": self.sin,
            "q_norm": self.q_norm,
            "k_norm": self.k_norm,
        }
        absent = (() if self.rotary else ("cos", "sin")) + (() if self.norms else ("q_norm", "k_norm"))
        y = run("PagedAttention", inputs, absent, **self.attributes())
        return np.split(y, np.cumsum(counts)[:-1])

    def attributes(self) -> dict[str, Any]:
        return {
            "layer": 1,
            "num_heads": self.heads,
            "kv_num_heads": self.kv_heads,
            "head_dim": self.dim,
            "rotary_interleaved": int(self.interleaved),
            "window": self.window,
            "scale": self.dim**-0.5,
            "softcap": self.softcap,
            "epsilon": 1e-5,
        }

    def twin(self, sequence: int) -> NDArray[np.float64]:
        """(length, heads·dim), one token after another."""
        x = self.sequences[sequence].astype(np.float64).reshape(-1, self.heads + 2 * self.kv_heads, self.dim)
        q, k, v = np.split(x, [self.heads, self.heads + self.kv_heads], axis=1)
        if self.norms:
            q, k = (
                each / np.sqrt((each**2).mean(-1, keepdims=True) + 1e-5) * weight
                for each, weight in ((q, self.q_norm), (k, self.k_norm))
            )
        if self.rotary:
            q, k = self._rotate(q), self._rotate(k)
        if self.codes:
            k, v = (_turned(_rounded(_turned(each))) for each in (k, v))
        out = []
        for position in range(len(x)):
            low = max(0, position + 1 - self.window) if self.window else 0
            for head in range(self.heads):
                kv = head * self.kv_heads // self.heads
                scores = k[low : position + 1, kv] @ q[position, head] * self.dim**-0.5
                if self.softcap:
                    scores = self.softcap * np.tanh(scores / self.softcap)
                weights = np.exp(scores - scores.max())
                out.append(weights / weights.sum() @ v[low : position + 1, kv])
        return np.array(out).reshape(len(x), -1)

    def _rotate(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        y, pairs = x.copy(), self.rotary // 2
        cos, sin = self.cos[: len(x), None], self.sin[: len(x), None]
        a, b = (
            (slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2))
            if self.interleaved
            else (slice(pairs), slice(pairs, 2 * pairs))
        )
        y[..., a] = x[..., a] * cos - x[..., b] * sin
        y[..., b] = x[..., b] * cos + x[..., a] * sin
        return y


def _turned(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """By Hadamard's matrix (Sylvester's construction) of the largest power of two that divides the size, in blocks."""
    size = x.shape[-1] & -x.shape[-1]
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return np.asarray((x.reshape(*x.shape[:-1], -1, size) @ matrix / math.sqrt(size)).reshape(x.shape))


def _rounded(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """(tokens, heads, dim) to 8 bits, each vector by its largest element."""
    scale = np.abs(x).max(-1, keepdims=True) / 127
    return np.round(x / scale) * scale


CASES = {
    "plain": Case(),
    "one head each": Case(heads=2, kv_heads=2),
    "many heads": Case(heads=8, kv_heads=1, dim=128, rotary=128),
    "partial, interleaved": Case(rotary=32, interleaved=True),
    "no positions": Case(rotary=0),
    "head norms": Case(norms=True),
    "soft cap": Case(softcap=3.0),
    "window": Case(window=40),
    "window of one": Case(window=1),
    "odd size": Case(dim=24, rotary=16),
    "size 80": Case(dim=80, rotary=80),
    "size 256": Case(heads=2, kv_heads=1, dim=256, rotary=256),
    "codes": Case(codes=True),
    "codes, many heads": Case(codes=True, heads=8, kv_heads=1, dim=128, rotary=128),
    "codes, window, soft cap": Case(codes=True, window=40, softcap=3.0, norms=True),
    "codes, odd size": Case(codes=True, dim=24, rotary=16),
    "codes, size 80": Case(codes=True, dim=80, rotary=80),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_agrees_with_the_plain_twin(case: Case) -> None:
    case.sequences.clear()
    case.add(331)  # over a segment of 256
    case.add(5)
    cache = case.cache()
    rows: list[list[NDArray[np.float32]]] = [[], []]
    for parts in ([(0, 0, 100), (1, 0, 3)], [(0, 100, 101), (1, 3, 4)], [(0, 101, 330)], [(1, 4, 5), (0, 330, 331)]):
        for (sequence, _, _), y in zip(parts, case.forward(cache, parts), strict=True):
            rows[sequence].append(y)
    for sequence in (0, 1):
        # keys and values are float16: about 2**-11 of each, and scores of the size of these. Codes are as in the twin,
        # but for those that float32 and float64 round to different sides
        np.testing.assert_allclose(np.concatenate(rows[sequence]), case.twin(sequence), atol=6e-3, rtol=0)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_token_does_not_depend_on_how_it_is_fed(case: Case) -> None:
    case.sequences.clear()
    case.add(300)
    case.add(40)
    whole = case.forward(case.cache(), [(0, 0, 300)])[0]
    cache = case.cache()
    pieces = [case.forward(cache, [(0, 0, 7)])[0], case.forward(cache, [(0, 7, 270), (1, 0, 40)])[0]]
    pieces += [case.forward(cache, [(0, start, start + 1)])[0] for start in range(270, 300)]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)


@pytest.mark.parametrize("codes", [False, True])
def test_what_is_no_number_is_not_hidden(codes: bool) -> None:
    case = Case(heads=4, kv_heads=2, rotary=0, codes=codes)
    case.add(6)
    qkv = case.sequences[0]
    qkv[3, 4 * 64 + 5] = np.nan  # in the key of the first KV head
    qkv[4, -1] = np.inf  # in the value of the second
    cache = case.cache()
    y = np.concatenate([case.forward(cache, [(0, token, token + 1)])[0] for token in range(6)])
    finite = np.isfinite(y.reshape(6, 4, 64)).all(-1)
    assert finite.tolist() == [[True] * 4] * 3 + [[False, False, True, True]] + [[False] * 4] * 2


def test_a_token_of_zeros_as_codes() -> None:
    case = Case(rotary=0, codes=True)
    case.add(3)
    case.sequences[0][1] = 0
    y = case.forward(case.cache(), [(0, 0, 3)])[0]
    expected = case.sequences[0][0, -2 * 64 :].reshape(2, 1, 64).repeat(3, axis=1).reshape(-1) / 2
    np.testing.assert_allclose(y[1], expected, atol=0.02)


def test_shares_that_would_take_too_much_memory_are_not_held_at_once() -> None:
    """31 tiles of 48 heads over 3 segments: too few tiles to be many, too many floats for all segments together."""
    case = Case(heads=48, kv_heads=1, dim=256, rotary=0)
    case.add(631)
    cache = case.cache()
    case.forward(cache, [(0, 0, 600)])
    together = case.forward(cache, [(0, 600, 631)])[0]
    alone = [case.forward(cache, [(0, token, token + 1)])[0] for token in range(600, 631)]
    np.testing.assert_array_equal(np.concatenate(alone), together)


def test_only_its_own_layer_and_blocks_are_written() -> None:
    case = Case()
    case.add(40)
    cache = case.cache()
    before = cache.copy()
    case.forward(cache, [(0, 0, 40)])
    changed = np.argwhere((cache != before).any((2, 3, 4)))
    assert {int(layer) for _, layer in changed} == {1}
    assert {int(block) for block, _ in changed} == set(case.tables()[0, :2].tolist())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("table", np.full((1, 1), 99, np.int32), "outside the KV cache"),
        ("past", np.array([32], np.int32), "longer than its row"),
        ("past", np.array([-1], np.int32), "without tokens"),
        ("begins", np.array([0, 2], np.int32), "cover all tokens"),
        ("qkv", np.zeros((1, 8), np.float32), "qkv must be"),
        ("cache", np.zeros((4, LAYERS, 2, 1, 128), np.uint8), "another shape"),
        ("cache", np.zeros((4, LAYERS, 2, 2, 32 * 65), np.uint8), "another shape"),
        ("begins", np.array([0], np.int32), r"begins must be \(sequences \+ 1\)"),
        ("past", np.zeros(0, np.int32), r"past must be \(sequences\)"),
        ("positions", np.zeros(0, np.int64), r"positions must be \(tokens\)"),
        ("positions", np.array([2**40]), "outside cos and sin"),
        ("positions", np.array([-1]), "outside cos and sin"),
        ("table", np.zeros(1, np.int32), "block table must be"),
        ("sin", np.zeros((1, 1), np.float32), "cos and sin must be"),
    ],
)
def test_wrong_inputs_are_refused(name: str, value: NDArray[Any], message: str) -> None:
    case = Case()
    case.add(1)
    with pytest.raises(Exception, match=message):
        run("PagedAttention", {**inputs_of(case), name: value}, **case.attributes())


def inputs_of(case: Case) -> Arrays:
    """Of its first token."""
    return {
        "qkv": case.sequences[0],
        "cache": case.cache(),
        "begins": np.array([0, 1], np.int32),
        "past": np.zeros(1, np.int32),
        "table": np.zeros((1, 1), np.int32),
        "positions": np.zeros(1, np.int64),
        "cos": case.cos,
        "sin": case.sin,
    }


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("layer", -1, "must not be negative"),
        ("window", -1, "must not be negative"),
        ("num_heads", 0, "whole groups"),
        ("num_heads", -4, "whole groups"),
        ("num_heads", 2**62, "fit 16 bits"),
        ("head_dim", 2**62, "fit 16 bits"),
        ("head_dim", -64, "fit 16 bits"),
    ],
)
def test_wrong_attributes_are_refused(name: str, value: int, message: str) -> None:
    case = Case()
    case.add(1)
    with pytest.raises(Exception, match=message):
        run("PagedAttention", inputs_of(case), **{**case.attributes(), name: value})


def test_companions_of_another_size_are_refused() -> None:
    case = Case()
    case.add(1)
    wide = np.zeros((4, 33), np.float32)  # more than half of a head's 64
    with pytest.raises(Exception, match="half the head size"):
        run("PagedAttention", {**inputs_of(case), "cos": wide, "sin": wide}, **case.attributes())
    norms = {"q_norm": np.ones(64, np.float32), "k_norm": np.ones(3, np.float32)}
    with pytest.raises(Exception, match="norm of keys"):
        run("PagedAttention", {**inputs_of(case), **norms}, **case.attributes())


@pytest.mark.parametrize("n", [1, 8, 19, 64])
@pytest.mark.parametrize("activation", [0, 1, 2])
def test_gates(activation: int, n: int) -> None:
    x = np.random.default_rng(n).normal(0, 4, (5, 2 * n)).astype(np.float32)
    x[0, 0], x[1, 0] = 200, -200
    gate, up = np.split(x.astype(np.float64), 2, axis=1)
    if activation == 0:
        gate = gate / (1 + np.exp(-gate))
    elif activation == 1:
        gate = 0.5 * gate * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    else:
        gate = 0.5 * gate * (1 + np.vectorize(math.erf)(gate / math.sqrt(2)))
    y = run("GatedUnit", {"x": x}, activation=activation)
    np.testing.assert_allclose(y, gate * up, rtol=1e-5, atol=1e-6)
