"""The CUDA runtime's copies, in host memory: for what moves bytes between addresses."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray


class HostMemory:
    def __init__(self, size: int) -> None:
        self.array = np.zeros(size, np.uint8)
        self.address = self.array.ctypes.data

    def free(self) -> None:
        self.address = 0


class HostRuntime:
    """Stands in for :class:`devices.cuda_memory.CudaRuntime`."""

    def __init__(self) -> None:
        self.allocated: list[HostMemory] = []

    def allocate(self, size: int) -> HostMemory:
        self.allocated.append(HostMemory(size))
        return self.allocated[-1]

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        return np.zeros(shape, dtype)

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        ctypes.memmove(target, source, size)

    def copy_rows(
        self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, rows: int, stream: int
    ) -> None:
        for row in range(rows):
            ctypes.memmove(target + row * target_pitch, source + row * source_pitch, width)

    def synchronize(self, stream: int) -> None:
        return
