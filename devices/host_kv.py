"""The KV cache of one sequence in host memory, of fixed capacity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from devices.lazy_memory import lazy_memory


class HostKV:
    """Implements :class:`devices.dense_decoder.DenseKV` by arrays of fixed capacity."""

    def __init__(self, heads: Sequence[int], capacity: int, head_dim: int, dtype: np.dtype[Any]) -> None:
        """A cache (heads, capacity, head_dim) for each of ``heads``; the system gives their memory when it is written
        to."""
        shapes = [(each, capacity, head_dim) for each in heads]
        sizes = [math.prod(shape) * dtype.itemsize for shape in shapes]
        self.caches = [
            np.frombuffer(lazy_memory(size), dtype).reshape(shape) for size, shape in zip(sizes, shapes, strict=True)
        ]
        """Keys and values, layer by layer."""

    def crop(self, length: int, held: int) -> None:
        """Changes nothing: what does not count is overwritten."""

    def read(self, start: int, stop: int) -> tuple[NDArray[np.generic], ...]:
        return tuple(cache[:, start:stop].copy() for cache in self.caches)

    def write(self, start: int, arrays: Sequence[NDArray[np.generic]]) -> None:
        for cache, array in zip(self.caches, arrays, strict=True):
            cache[:, start : start + array.shape[1]] = array

    def copy_of(self, other: HostKV, length: int) -> None:
        self.write(0, [cache[:, :length] for cache in other.caches])

    def close(self) -> None:
        self.caches = []
