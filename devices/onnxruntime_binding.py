"""What an ONNX Runtime session reads and writes in one call over a range of KV cache rows, bound once and reused."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from devices.kv_rows import KVRows

KEPT_ROWS = 16
"""Logits of up to so many tokens are written to one buffer that every call uses; more get a buffer of their own."""


class LogitsBuffer:
    """Where calls write their logits: (rows, vocab_size) float32, valid until the next call."""

    def __init__(self, vocab_size: int) -> None:
        self._kept = np.empty((KEPT_ROWS, vocab_size), np.float32)

    def rows(self, count: int) -> NDArray[np.float32]:
        if count <= KEPT_ROWS:
            return self._kept[:count]
        return np.empty((count, self._kept.shape[1]), np.float32)


class RowsBinding:
    """``count`` rows of the KV cache from ``first`` on, with the arrays that a call over them takes.

    The arrays are made and bound when :meth:`prepare` meets a new shape; between calls of the same shape, as decoding
    makes them, only their values change.
    """

    def __init__(
        self,
        session: Any,
        kv: KVRows,
        logits: LogitsBuffer,
        first: int,
        count: int,
        *,
        positions: bool,
        copied: bool,
    ) -> None:
        """``positions``: the graph has an input ``position_ids``. ``copied``: inputs are copied when they are bound, as
        they are for a plugin's provider; they are then bound by :meth:`bind_inputs` alone."""
        self._copied = copied
        self._logits = logits
        self._count = count
        self._positions = positions
        self._shape: tuple[int, int] | None = None
        self.binding = session.io_binding()
        for buffer, rows in enumerate(kv.buffers):
            shape = (count, *rows.shape[1:])
            layer, kind = buffer // 2, ("key", "value")[buffer % 2]
            address = kv.address(buffer, first)
            self.binding.bind_input(f"past_key_values.{layer}.{kind}", "cpu", 0, np.float32, shape, address)
            self.binding.bind_output(f"present.{layer}.{kind}", "cpu", 0, np.float32, shape, address)

    def prepare(self, width: int, rows: int) -> None:
        """Arrays for ``width`` tokens in each row and ``rows`` logits over all; all rows idle, tokens and positions 0.

        ``ids``, ``positions`` (count, width) int64; ``held`` (tokens after the call, less one), ``new`` (count,) int32;
        ``total`` () int32, the longest row after the call; ``row_index`` (rows,) int64, which of count × width tokens
        give logits; ``logits`` (rows, vocab_size) float32.
        """
        if self._shape != (width, rows):
            self._allocate(width, rows)
            self._bind()
            # a buffer of their own would be held until the next call
            self._shape = (width, rows) if rows <= KEPT_ROWS else None
        self.ids.fill(0)
        self.positions.fill(0)
        self.held.fill(0)  # idle rows: one token held, none new; nothing is written
        self.new.fill(0)

    def _allocate(self, width: int, rows: int) -> None:
        self.ids = np.zeros((self._count, width), np.int64)
        self.positions = np.zeros((self._count, width), np.int64)
        self.held = np.zeros(self._count, np.int32)
        self.new = np.zeros(self._count, np.int32)
        self.total = np.zeros((), np.int32)
        self.row_index = np.zeros(rows, np.int64)
        self.logits = self._logits.rows(rows)

    def _bind(self) -> None:
        if not self._copied:
            self.bind_inputs()
        logits = self.logits
        self.binding.bind_output("logits", "cpu", 0, logits.dtype, logits.shape, logits.ctypes.data)

    def bind_inputs(self) -> None:
        """All but the KV cache, which attention, the CPU's own operator everywhere, takes from where it is."""
        inputs: dict[str, NDArray[np.generic]] = {
            "input_ids": self.ids,
            "seqlens_k": self.held,
            "query_seqlens": self.new,
            "total_sequence_length": self.total,
            "row_index": self.row_index,
        }
        if self._positions:
            inputs["position_ids"] = self.positions
        for name, array in inputs.items():
            self.binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
