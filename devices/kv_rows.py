"""Dense KV cache: for each layer keys and values [rows, kv_heads, capacity, head_dim], of which only used pages exist.

The buffers are anonymous mappings as large as the longest sequence in every row; the system gives a page when it is
first written, and gets it back when a sequence ends or is cut. So memory follows the tokens held, not the capacity.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from devices.lazy_memory import small_pages

_KEEP_TOKENS = 64
"""Pages of fewer tokens are not given back: a crop by a few drafted tokens is followed by as many new ones."""


class KVRows:
    """Memory of ``rows`` sequences. Rows know nothing of their length: the caller says how many tokens are in use."""

    def __init__(self, rows: int, heads: Sequence[int], tokens: int, head_dim: int) -> None:
        """``heads``: of each buffer, as :attr:`buffers` has them. ``tokens``: the most a row can hold; the capacity is
        that, rounded up to whole pages.

        OSError or MemoryError if the address space cannot be had.
        """
        token_bytes = head_dim * np.dtype(np.float32).itemsize
        step = mmap.PAGESIZE // np.gcd(mmap.PAGESIZE, token_bytes)  # tokens of a head that are whole pages
        self.capacity = int(-(-tokens // step) * step)
        self._token_bytes = token_bytes
        shapes = [(rows, count, self.capacity, head_dim) for count in heads]
        self._maps = [small_pages(math.prod(shape) * 4) for shape in shapes]
        self.buffers = [
            np.frombuffer(m, np.float32).reshape(shape) for m, shape in zip(self._maps, shapes, strict=True)
        ]
        """Keys and values, layer by layer (k0, v0, k1, v1, …)."""

    def address(self, buffer: int, row: int) -> int:
        """Where row ``row`` of buffer number ``buffer`` begins."""
        return int(self.buffers[buffer].ctypes.data + row * self.buffers[buffer].strides[0])

    def copy(self, source: int, target: int, length: int) -> None:
        """The first ``length`` tokens of one row into another."""
        for buffer in self.buffers:
            buffer[target, :, :length] = buffer[source, :, :length]

    def exchange(self, a: int, a_length: int, b: int, b_length: int) -> None:
        """Swap two rows that hold ``a_length`` and ``b_length`` tokens."""
        for buffer in self.buffers:
            kept = buffer[a, :, :a_length].copy()
            buffer[a, :, :b_length] = buffer[b, :, :b_length]
            buffer[b, :, :a_length] = kept
        self.release(a, b_length, a_length, at_least=1)
        self.release(b, a_length, b_length, at_least=1)

    def read(self, row: int, start: int, stop: int) -> tuple[NDArray[np.float32], ...]:
        """Copies of tokens ``start`` to ``stop``: (kv_heads, stop − start, head_dim) for each buffer."""
        return tuple(buffer[row, :, start:stop].copy() for buffer in self.buffers)

    def write(self, row: int, start: int, arrays: Sequence[NDArray[np.generic]]) -> None:
        """What :meth:`read` gave, from token ``start`` on."""
        for buffer, array in zip(self.buffers, arrays, strict=True):
            buffer[row, :, start : start + array.shape[1]] = array

    def release(self, row: int, start: int, end: int, at_least: int = _KEEP_TOKENS) -> None:
        """Give back the memory of tokens ``start .. end − 1``, where the system can and they are ``at_least`` so many,
        or all of the row.
        """
        if (end - start < at_least and start > 0) or not hasattr(mmap, "MADV_DONTNEED"):
            return
        head_bytes = self.capacity * self._token_bytes
        low = -(-start * self._token_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        high = min(-(-end * self._token_bytes // mmap.PAGESIZE) * mmap.PAGESIZE, head_bytes)
        if high <= low:
            return
        for memory, buffer in zip(self._maps, self.buffers, strict=True):
            heads = buffer.shape[1]
            for head in range(heads):
                memory.madvise(mmap.MADV_DONTNEED, (row * heads + head) * head_bytes + low, high - low)

    def close(self) -> None:
        """Unmap everything. Addresses given out are no longer valid."""
        self.buffers.clear()
        for memory in self._maps:
            with suppress(BufferError):  # an error's frames may hold arrays of its call; the memory goes with them
                memory.close()
        self._maps.clear()
