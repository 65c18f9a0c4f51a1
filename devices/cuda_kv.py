"""Blocks of KV cache in GPU memory: for each layer keys and values [blocks, block_size, kv_heads, head_dim]."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from devices.cuda_memory import CudaRuntime


class CudaBlocks:
    """All caches are one allocation, so that a block of every layer is moved by one call."""

    def __init__(
        self, runtime: CudaRuntime, stream: int, buffers: int, blocks: int, block: tuple[int, int, int], dtype: np.dtype
    ) -> None:
        """``buffers``: keys and values over all layers. ``block``: (block_size, kv_heads, head_dim).

        ``dtype``: as wide as the caches' element type. EngineError if the memory cannot be had.
        """
        self._runtime = runtime
        self._stream = stream
        self._buffers = buffers
        self._block = block
        self._dtype = dtype
        self._block_bytes = int(np.prod(block)) * dtype.itemsize
        self._pitch = blocks * self._block_bytes
        self.shape = (blocks, *block)
        self._memory = runtime.allocate(buffers * self._pitch)

    @property
    def block_bytes(self) -> int:
        """Of one block, over all layers."""
        return self._buffers * self._block_bytes

    def address(self, buffer: int) -> int:
        """Where cache number ``buffer`` (k0, v0, k1, v1, …) begins."""
        return self._memory.address + buffer * self._pitch

    def copy(self, source: int, target: int) -> None:
        """One block to another, in stream order."""
        start, size = self._memory.address, self._block_bytes
        self._runtime.copy_rows(
            start + target * size, self._pitch, start + source * size, self._pitch, size, self._buffers, self._stream
        )

    def read(self, blocks: list[int], length: int) -> tuple[NDArray[np.generic], ...]:
        """The first ``length`` tokens of a table: (length, kv_heads, head_dim) for each cache."""
        host = np.empty((self._buffers, length, *self._block[1:]), self._dtype)
        self._move(host, blocks, to_host=True)
        return tuple(host)

    def write(self, blocks: list[int], arrays: tuple[NDArray[np.generic], ...]) -> None:
        self._move(np.ascontiguousarray(np.stack(arrays)), blocks, to_host=False)

    def release(self, blocks: range) -> None:
        """Nothing: one allocation, which the GPU keeps whole."""

    def form(self, length: int) -> list[tuple[tuple[int, ...], np.dtype[Any]]]:
        """Shape and type of each array that :meth:`read` gives."""
        return [((length, *self._block[1:]), self._dtype)] * self._buffers

    def _move(self, host: NDArray[np.generic], blocks: list[int], to_host: bool) -> None:
        """All of ``host`` (buffers, tokens, …) from or to the blocks of a table."""
        pitch, token = host.strides[0], self._block_bytes // self._block[0]
        for index, block in enumerate(blocks):
            first = index * self._block[0]
            width = min(self._block[0], host.shape[1] - first) * token
            here, there = host.ctypes.data + first * token, self._memory.address + block * self._block_bytes
            if to_host:
                self._runtime.copy_rows(here, pitch, there, self._pitch, width, self._buffers, self._stream)
            else:
                self._runtime.copy_rows(there, self._pitch, here, pitch, width, self._buffers, self._stream)
        self._runtime.synchronize(self._stream)

    def free(self) -> None:
        self._memory.free()
