"""Sizes that the contract's decoders are opened with, and how they are fed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from devices.base import Decoder, DecoderSequence, Step

CONTEXT = 320  # more than SNAPSHOT_STEP
CHUNK = 48
PROMPT = 128
SEQUENCES = 5
TOLERANCE = {"onnxruntime:cuda": 0.05, "openvino:npu-emulated": 0.05, "edge:cpu": 0.0}
"""CUDA computes in float16; these logits reach 14, and Transformers in float16 is as far from itself in float32. The
NPU's KV cache is float16. Our own kernels compute a token alike whatever is beside it; their KV cache is float16 in
every case compared."""
Open = Callable[[int | None], Decoder]
"""Open a decoder with so many tokens of KV cache."""


def ids(seed: int, length: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, 64, length)


def feed(
    decoder: Decoder, sequence: DecoderSequence, tokens: NDArray[np.int64], sizes: Sequence[int]
) -> NDArray[np.float32]:
    """Logits of all ``tokens``, fed in pieces of the given sizes, again and again."""
    rows, start, turn = [], 0, 0
    while start < len(tokens):
        piece = tokens[start : start + sizes[turn % len(sizes)]]
        rows += decoder.forward([Step(sequence, piece, len(piece))])
        start, turn = start + len(piece), turn + 1
    return np.concatenate(rows)


def alone(decoder: Decoder, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    """(len, vocab): what every other way of computing must give."""
    sequence = decoder.new_sequence(len(tokens))
    rows = feed(decoder, sequence, tokens, [CHUNK])
    sequence.close()
    return rows


def same(decoder: Decoder, a: NDArray[np.float32], b: NDArray[np.float32]) -> None:
    assert a.dtype == np.float32
    np.testing.assert_allclose(a, b, atol=TOLERANCE.get(decoder.device, 1e-3), rtol=0)
