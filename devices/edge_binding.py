"""What a session over our own operators reads and writes in calls of one shape, bound once and reused.

The graph's inputs are described in :mod:`exporters.onnx_edge_builder`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from devices.paged_decoder import Part


class Shape(NamedTuple):
    """Of a call."""

    tokens: int
    sequences: int
    width: int
    """Blocks that a row of the block table has room for."""
    rows: int
    """Logits, over all sequences."""


class SharedLogits:
    """Where calls write their logits, (rows, vocab_size) float32, which then belong to whoever asked for them: a copy
    would take a fiftieth of the time of a token of a small model.

    Who holds a view of the buffer CPython's reference count tells, for each view has the buffer itself as its base.
    """

    def __init__(self, rows: int, vocab_size: int) -> None:
        self._logits = np.empty((rows, vocab_size), np.float32)
        self._unshared = sys.getrefcount(self._logits)

    def renew(self) -> bool:
        """Where anybody still holds a view of the buffer it is theirs, and another one is taken; returns whether."""
        if sys.getrefcount(self._logits) == self._unshared:
            return False
        self._logits = np.empty_like(self._logits)
        return True

    def view(self, rows: int) -> NDArray[np.float32]:
        """(rows, vocab_size): the first ``rows``. A view of it, too, holds the buffer."""
        return self._logits[:rows]


class EdgeBinding:
    """The arrays of calls of one shape. Between such calls, as decoding makes them, only their values change."""

    def __init__(self, session: Any, cache: NDArray[np.uint8], logits: NDArray[np.float32], shape: Shape) -> None:
        """``cache``: the whole KV cache; ``logits`` (rows, vocab_size): where calls write them. Holds neither."""
        self._ids = np.zeros(shape.tokens, np.int64)
        self._positions = np.zeros(shape.tokens, np.int64)
        self._begins = np.zeros(shape.sequences + 1, np.int32)
        self._past = np.zeros(shape.sequences, np.int32)
        self._table = np.zeros((shape.sequences, shape.width), np.int32)
        self._row_index = np.zeros(shape.rows, np.int64)
        self._blocks: list[list[int]] = [[] for _ in range(shape.sequences)]
        """What the rows of the table say: turning a list into an array takes longer than comparing two."""
        self.binding = session.io_binding()
        inputs: dict[str, NDArray[np.generic]] = {
            "input_ids": self._ids,
            "positions": self._positions,
            "begins": self._begins,
            "past": self._past,
            "block_table": self._table,
            "row_index": self._row_index,
            "kv_cache": cache,
        }
        for name, array in inputs.items():
            self.binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        self.binding.bind_output("logits", "cpu", 0, logits.dtype, logits.shape, logits.ctypes.data)

    def write(self, parts: Sequence[Part]) -> None:
        """The inputs of a call over ``parts``, which must be of this shape."""
        begin = row = 0
        for index, (tokens, past, position, blocks, rows) in enumerate(parts):
            end = begin + len(tokens)
            self._ids[begin:end] = tokens
            self._positions[begin:end] = np.arange(position, position + end - begin)
            self._past[index] = past
            self._begins[index + 1] = end
            if rows:
                self._row_index[row : row + rows] = np.arange(end - rows, end)
            if self._blocks[index] != blocks:
                self._blocks[index] = blocks.copy()
                self._table[index, : len(blocks)] = blocks
            begin, row = end, row + rows
