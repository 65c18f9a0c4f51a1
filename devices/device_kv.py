"""Dense KV cache of one sequence in a plugin provider's memory: keys and values, layer by layer, that grow in steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from devices.onnxruntime_session import engine_errors

_STEP = 256
"""Tokens of the smallest capacity; it doubles from there, since each has shaders and buffers of its own."""


class DeviceKV:
    """Implements :class:`devices.dense_decoder.DenseKV` by OrtValues (1, kv_heads, capacity, head_dim) float32. What is
    not yet used is zero."""

    def __init__(self, memory: Any, heads: Sequence[int], head_dim: int, most: int) -> None:
        """``memory``: ONNX Runtime's name for the device's. ``heads``: of each value. ``most``: tokens that will ever
        be held."""
        self._memory = memory
        self._heads = heads
        self._head_dim = head_dim
        self._most = most
        self._capacity = 0
        self.values: list[Any] = []
        """k0, v0, k1, v1, …"""
        self.binding: Any = None
        """For the user to keep what binds these values; None again when there are others."""

    def reserve(self, tokens: int, held: int) -> None:
        """Room for ``tokens`` tokens, of which the first ``held`` stay."""
        if tokens <= self._capacity:
            return
        capacity = _STEP
        while capacity < tokens:
            capacity *= 2
        before = self.read(0, held) if held else None
        self.close()
        self._capacity = min(capacity, self._most)
        with engine_errors("reserving a KV cache"):
            self.values = [self._empty(heads) for heads in self._heads]
        if before is not None:
            self.write(0, before)

    def crop(self, length: int, held: int) -> None:
        """Changes nothing: what does not count is overwritten."""

    def copy_of(self, other: DeviceKV, length: int) -> None:
        """All that ``other`` has, at once on the device."""
        import onnxruntime

        self.close()
        self._capacity = other._capacity
        with engine_errors("copying the KV cache"):
            self.values = [self._empty(heads) for heads in self._heads]
            onnxruntime.copy_tensors(other.values, self.values)

    def read(self, start: int, stop: int) -> tuple[NDArray[np.generic], ...]:
        with engine_errors("reading the KV cache"):
            return tuple(value.numpy()[0, :, start:stop].copy() for value in self.values)

    def write(self, start: int, arrays: Sequence[NDArray[np.generic]]) -> None:
        import onnxruntime

        self.reserve(start + arrays[0].shape[1], start)
        with engine_errors("writing the KV cache"):
            for value, array in zip(self.values, arrays, strict=True):
                whole = value.numpy() if start else np.zeros(value.shape(), np.float32)
                whole[0, :, start : start + array.shape[1]] = array
                onnxruntime.copy_tensors([onnxruntime.OrtValue.ortvalue_from_numpy(whole)], [value])

    def close(self) -> None:
        self.values = []
        self.binding = None
        self._capacity = 0

    def _empty(self, heads: int) -> Any:
        import onnxruntime

        shape = (1, heads, self._capacity, self._head_dim)
        return onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, np.float32, memory_info=self._memory)
