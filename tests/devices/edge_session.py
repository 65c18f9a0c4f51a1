"""ONNX Runtime's session over our own operators, without either: what the decoder around it does must be right.

It keeps *tokens and their positions* where the operators keep keys and values, in every layer of the cache, and its
logits are a pure function of what it reads back through the block tables, so that any mistake in them, in the copies of
blocks or in the other inputs changes the answer.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from devices.base import DecoderOptions, DecoderSpec

BLOCK = 32
SPEC = DecoderSpec("onnxruntime-edge", Path("model.onnx"), 3, 4, 2, 16, 64, 320)
_STATES = 4093


class EdgeBindingStandIn:
    """What was bound, as arrays over the addresses."""

    def __init__(self) -> None:
        self.arrays: dict[str, NDArray[Any]] = {}

    def bind_input(self, name: str, device: str, index: int, dtype: Any, shape: tuple[int, ...], address: int) -> None:
        assert (device, index) == ("cpu", 0)
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        memory = (ctypes.c_byte * size).from_address(address)
        self.arrays[name] = np.frombuffer(memory, dtype).reshape(shape) if size else np.empty(shape, dtype)

    bind_output = bind_input


class EdgeSession:
    """Stands in for an InferenceSession."""

    def __init__(self, spec: DecoderSpec) -> None:
        self.cache: list[int | str] = ["blocks", spec.num_layers, 2, spec.num_kv_heads, "head_bytes"]
        self.table = np.random.default_rng(0).standard_normal((_STATES, spec.vocab_size)).astype(np.float32)
        self.bound: list[EdgeBindingStandIn] = []
        self.calls: list[dict[str, NDArray[Any]]] = []
        """The inputs of each, but for the cache."""
        self.error: Exception | None = None
        """What the next run fails with."""

    def get_inputs(self) -> list[Any]:
        return [SimpleNamespace(name="kv_cache", type="tensor(uint8)", shape=self.cache)]

    def io_binding(self) -> EdgeBindingStandIn:
        self.bound.append(EdgeBindingStandIn())
        return self.bound[-1]

    def run_with_iobinding(self, binding: EdgeBindingStandIn) -> None:
        if self.error is not None:
            raise self.error
        inputs = dict(binding.arrays)
        cache, logits = inputs.pop("kv_cache").view(np.float16), inputs.pop("logits")
        self.calls.append({name: array.copy() for name, array in inputs.items()})
        self._check(inputs)
        states = []
        for sequence, past in enumerate(inputs["past"]):
            begin, end = inputs["begins"][sequence : sequence + 2]
            table = inputs["block_table"][sequence]
            for offset, (token, position) in enumerate(
                zip(inputs["input_ids"][begin:end], inputs["positions"][begin:end], strict=True)
            ):
                held = past + offset
                cache[table[held // BLOCK], :, 0, :, held % BLOCK] = token
                cache[table[held // BLOCK], :, 1, :, held % BLOCK] = position
                states.append(self._state(cache, table, held + 1))
        logits[:] = self.table[[states[row] for row in inputs["row_index"]]]

    def _check(self, inputs: dict[str, NDArray[Any]]) -> None:
        types = {name: array.dtype.name for name, array in inputs.items()}
        assert types == {
            "input_ids": "int64",
            "positions": "int64",
            "begins": "int32",
            "past": "int32",
            "block_table": "int32",
            "row_index": "int64",
        }
        assert inputs["begins"][0] == 0
        assert inputs["begins"][-1] == len(inputs["input_ids"]) == len(inputs["positions"])
        assert len(inputs["block_table"]) == len(inputs["past"]) == len(inputs["begins"]) - 1

    def _state(self, cache: NDArray[Any], table: NDArray[Any], length: int) -> int:
        """A rolling hash of the first ``length`` tokens and positions, each layer and head in its turn."""
        state = 1
        _, layers, _, heads, _ = cache.shape
        for held in range(length):
            token, position = cache[table[held // BLOCK], held % layers, :, held % heads, held % BLOCK]
            state = (state * 131 + int(token) * 7 + int(position) + 1) % _STATES
        return state


@contextmanager
def standing_in() -> Iterator[list[EdgeSession]]:
    """Decoders opened within get such sessions, which are appended to the list."""
    opened: list[EdgeSession] = []

    def open_session(spec: DecoderSpec, options: DecoderOptions, device: str, operators: Path) -> EdgeSession:
        assert (device, operators) == ("edge:cpu", Path("_kernels.so"))
        opened.append(EdgeSession(spec))
        return opened[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("devices.onnxruntime_edge.open_session", open_session)
        patch.setattr("devices.onnxruntime_edge.kernels_library", lambda: Path("_kernels.so"))
        yield opened
