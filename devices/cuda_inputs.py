"""A step's integers on their way to the GPU: one piece of pinned host memory, its twin on the device, one copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from devices.cuda_memory import CudaRuntime
from devices.paged_decoder import Part

_ALIGNMENT = 256  # bytes; as cudaMalloc's own


class StepInputs:
    """The graph's integer inputs at fixed addresses. See :mod:`exporters.onnx_cuda_builder` for what they say."""

    def __init__(
        self, runtime: CudaRuntime, stream: int, tokens: int, sequences: int, table_width: int, positions: bool
    ) -> None:
        """For at most ``tokens`` tokens of ``sequences`` sequences, whose tables have ``table_width`` blocks."""
        self._runtime = runtime
        self._stream = stream
        self._width = table_width
        sizes: dict[str, tuple[int, Any]] = {
            "cumulative_sequence_length": (sequences + 1, np.int32),
            "past_seqlens": (sequences, np.int32),
            "block_table": (sequences * table_width, np.int32),
            "input_ids": (tokens, np.int32),
            "row_index": (tokens, np.int32),
        }
        if positions:
            sizes["position_ids"] = (tokens, np.int64)
        ends = np.cumsum(
            [-(-count * np.dtype(kind).itemsize // _ALIGNMENT) * _ALIGNMENT for count, kind in sizes.values()]
        )
        self._bytes = int(ends[-1])
        self._host = runtime.pinned((self._bytes,), np.uint8)
        self._device = runtime.allocate(self._bytes)
        self._fields: dict[str, tuple[int, NDArray[Any]]] = {}
        for (name, (count, kind)), start in zip(sizes.items(), [0, *ends], strict=False):
            view = self._host[start : start + count * np.dtype(kind).itemsize].view(kind)
            self._fields[name] = (self._device.address + int(start), view)

    def write(self, parts: Sequence[Part]) -> dict[str, tuple[int, tuple[int, ...], Any]]:
        """Send ``parts`` to the device; returns address, shape and type of every input, for binding."""
        counts = [len(part.tokens) for part in parts]
        ends = np.cumsum(counts)
        table = np.zeros((len(parts), self._width), np.int32)
        for row, part in zip(table, parts, strict=True):
            row[: len(part.blocks)] = part.blocks
        rows = [np.arange(end - part.rows, end) for end, part in zip(ends, parts, strict=True)]
        values: dict[str, NDArray[Any]] = {
            "cumulative_sequence_length": np.array([0, *ends]),
            "past_seqlens": np.array([part.past for part in parts]),
            "block_table": table,
            "input_ids": np.concatenate([part.tokens for part in parts]),
            "row_index": np.concatenate(rows) if any(part.rows for part in parts) else np.zeros(1),  # never none
        }
        if "position_ids" in self._fields:
            positions = [np.arange(part.position, part.position + n) for part, n in zip(parts, counts, strict=True)]
            values["position_ids"] = np.concatenate(positions)[None]
        bound = {}
        for name, value in values.items():
            address, view = self._fields[name]
            view[: value.size] = value.reshape(-1)
            bound[name] = (address, value.shape, view.dtype)
        self._runtime.copy(self._device.address, self._host.ctypes.data, self._bytes, self._stream)
        return bound

    def free(self) -> None:
        self._device.free()
