"""Dense KV cache of one sequence in a plugin provider's memory: keys and values, layer by layer, that grow in steps."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_STEP = 256
"""Tokens of the smallest capacity; it doubles from there, since each has shaders and buffers of its own."""


class DeviceKV:
    """OrtValues (1, kv_heads, capacity, head_dim) float32. What is not yet used is zero."""

    def __init__(self, memory: Any, layers: int, kv_heads: int, head_dim: int, most: int) -> None:
        """``memory``: ONNX Runtime's name for the device's. ``most``: tokens that will ever be held."""
        self._memory = memory
        self._layers = layers
        self._heads = kv_heads
        self._head_dim = head_dim
        self._most = most
        self.capacity = 0
        self.values: list[Any] = []
        """k0, v0, k1, v1, …"""

    def reserve(self, tokens: int, held: int) -> None:
        """Room for ``tokens`` tokens, of which the first ``held`` stay."""
        if tokens <= self.capacity:
            return
        capacity = _STEP
        while capacity < tokens:
            capacity *= 2
        before = self.read(0, held) if held else None
        self.capacity = min(capacity, self._most)
        self.values = [self._empty() for _ in range(2 * self._layers)]
        if before is not None:
            self.write(0, before)

    def copy_of(self, other: DeviceKV) -> None:
        """All that ``other`` has, which has the same shape but for its capacity."""
        import onnxruntime

        self.capacity = other.capacity
        self.values = [self._empty() for _ in other.values]
        if self.values:
            onnxruntime.copy_tensors(other.values, self.values)

    def read(self, start: int, stop: int) -> tuple[NDArray[np.float32], ...]:
        """Copies of tokens ``start`` to ``stop``: (kv_heads, stop − start, head_dim) each."""
        return tuple(value.numpy()[0, :, start:stop].copy() for value in self.values)

    def write(self, start: int, arrays: tuple[NDArray[np.generic], ...]) -> None:
        """What :meth:`read` gave, from token ``start`` on; there is room."""
        import onnxruntime

        for value, array in zip(self.values, arrays, strict=True):
            whole = value.numpy() if start else np.zeros(value.shape(), np.float32)
            whole[0, :, start : start + array.shape[1]] = array
            onnxruntime.copy_tensors([onnxruntime.OrtValue.ortvalue_from_numpy(whole)], [value])

    def close(self) -> None:
        self.values = []
        self.capacity = 0

    def _empty(self) -> Any:
        import onnxruntime

        shape = (1, self._heads, self.capacity, self._head_dim)
        return onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, np.float32, memory_info=self._memory)
