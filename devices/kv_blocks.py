"""Blocks of KV cache in host memory: bytes [blocks, layers, 2 (keys, values), kv_heads, bytes of a head's block]."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from devices.errors import EngineError
from devices.lazy_memory import lazy_memory, release_pages


class KVBlocks:
    """One piece of memory, of which the system gives what is written to; a block of all layers lies together."""

    def __init__(self, blocks: int, block_size: int, layers: int, kv_heads: int, head_bytes: int) -> None:
        """EngineError, naming the size, if the address space cannot be had."""
        self._block_size = block_size
        shape = (blocks, layers, 2, kv_heads, head_bytes)
        size = blocks * layers * 2 * kv_heads * head_bytes
        try:
            self._memory = lazy_memory(size)
            self.values = np.frombuffer(self._memory, np.uint8).reshape(shape)
        except (OSError, MemoryError, OverflowError, ValueError) as error:
            raise EngineError(
                f"no address space for a KV cache of {size} bytes ({error}); lower kv_tokens or max_sequences"
            ) from error
        self.block_bytes = size // blocks
        """Of one block, over all layers."""

    def copy(self, source: int, target: int) -> None:
        """One block to another."""
        self.values[target] = self.values[source]

    def release(self, blocks: range) -> None:
        """Give back the memory of these."""
        release_pages(self._memory, blocks.start * self.block_bytes, blocks.stop * self.block_bytes)

    def read(self, blocks: list[int], tokens: int) -> tuple[NDArray[np.uint8], ...]:
        """Copies, (len(blocks), kv_heads, head_bytes) each: keys and values, layer by layer."""
        _, layers, kinds, _, _ = self.values.shape
        return tuple(self.values[blocks, layer, kind] for layer in range(layers) for kind in range(kinds))

    def write(self, blocks: list[int], arrays: tuple[NDArray[np.generic], ...]) -> None:
        """What :meth:`read` gave, into other blocks."""
        for index, array in enumerate(arrays):
            self.values[blocks, index // 2, index % 2] = array

    def form(self, tokens: int) -> list[tuple[tuple[int, ...], np.dtype[Any]]]:
        """Shape and type of the arrays that :meth:`read` gives of so many tokens."""
        _, layers, kinds, *head = self.values.shape
        return [((-(-tokens // self._block_size), *head), self.values.dtype)] * (layers * kinds)

    def close(self) -> None:
        """Give the memory back. Its address is no longer valid."""
        self.values = np.empty((0, *self.values.shape[1:]), np.uint8)
