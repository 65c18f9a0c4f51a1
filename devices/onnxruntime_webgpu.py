"""A decoder over ONNX Runtime's WebGPU provider, which comes as a plugin; the KV cache lives in the GPU's memory.

The graph is that of :mod:`exporters.onnx_builder`. Every sequence has a dense cache of its own, past and present in one
buffer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from devices.base import DecoderOptions, DecoderSpec, Step
from devices.dense_decoder import DenseDecoder, DenseSequence
from devices.device_kv import DeviceKV
from devices.kv_types import choose_kv_type
from devices.onnxruntime_session import engine_errors, open_session
from devices.plugins import on_processor, plugin_memory

NAME = "onnxruntime:webgpu"
_SOFTWARE_STEP = 31
"""Tokens run at once on a software adapter: the provider's kernels for 32 and more, right on a GPU, give wrong numbers
there (SwiftShader of Chromium 156, onnxruntime-ep-webgpu 0.4.0)."""


class StepBinding:
    """What a step of ``new`` tokens reads and writes; of another one only the values differ."""

    def __init__(self, session: Any, kv: DeviceKV, new: int, rows: int, vocab_size: int, positions: bool) -> None:
        """``positions``: the graph has an input ``position_ids``."""
        self.ids = np.zeros((1, new), np.int64)
        self.held = np.zeros(1, np.int32)
        """After the step, less one."""
        self.total = np.zeros((), np.int32)
        self.positions = np.zeros((1, new), np.int64)
        self.logits = np.empty((rows, vocab_size), np.float32)
        self.binding = session.io_binding()
        self._inputs: dict[str, NDArray[np.generic]] = {
            "input_ids": self.ids,
            "seqlens_k": self.held,
            "query_seqlens": np.array([new], np.int32),
            "total_sequence_length": self.total,
            "row_index": np.arange(new - rows, new, dtype=np.int64),
        }
        if positions:
            self._inputs["position_ids"] = self.positions
        for index, value in enumerate(kv.values):
            layer, kind = index // 2, ("key", "value")[index % 2]
            self.binding.bind_ortvalue_input(f"past_key_values.{layer}.{kind}", value)
            self.binding.bind_ortvalue_output(f"present.{layer}.{kind}", value)
        logits = self.logits
        self.binding.bind_output("logits", "cpu", 0, logits.dtype, logits.shape, logits.ctypes.data)

    def bind_inputs(self) -> None:
        """Once they have their values: what lies in host memory is copied to the device when it is bound."""
        for name, array in self._inputs.items():
            self.binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)


class OnnxRuntimeWebGpuDecoder(DenseDecoder[DeviceKV]):
    """Implements :class:`devices.base.Decoder`; everything is computed in float32.

    DeviceUnavailable without the plugin and hardware for it, EngineError if the model is refused.
    """

    def __init__(self, spec: DecoderSpec, options: DecoderOptions) -> None:
        choose_kv_type(NAME, options.kv_type, ("float32",))
        super().__init__(NAME, spec, options, np.float32)
        self._session: Any = open_session(spec, options, NAME)
        self._memory = plugin_memory(NAME)
        self._longest = _SOFTWARE_STEP if on_processor(NAME) else options.prefill_chunk

    def _new_kv(self) -> DeviceKV:
        spec = self._spec
        return DeviceKV(self._memory, spec.heads_of_caches, spec.head_dim, self._limits.max_context)

    def _run(self, sequence: DenseSequence[DeviceKV], step: Step) -> NDArray[np.float32]:
        count, longest = step.tokens.size, self._longest
        if count <= longest:
            return self._call(sequence, step.tokens, step.rows)
        rows = []
        for start in range(0, count, longest):
            part = step.tokens[start : start + longest]
            wanted = min(max(step.rows - (count - start - len(part)), 0), len(part))
            rows.append(self._call(sequence, part, wanted))
        return np.concatenate(rows)

    def _call(self, sequence: DenseSequence[DeviceKV], tokens: NDArray[np.int64], rows: int) -> NDArray[np.float32]:
        held, new = sequence.length, tokens.size
        sequence.kv.reserve(held + new, held)
        with engine_errors("running the model on WebGPU"):
            bound = self._binding(sequence.kv, new, max(rows, 1))  # the provider has no shape for no row
            bound.ids[0] = tokens
            bound.held[0] = bound.total[()] = held + new
            bound.held[0] -= 1
            first = self._position(sequence)
            bound.positions[0] = np.arange(first, first + new)
            bound.bind_inputs()
            with self._stopwatch:
                self._session.run_with_iobinding(bound.binding)
        sequence.grow(new)
        return bound.logits[len(bound.logits) - rows :].copy()

    def _binding(self, kv: DeviceKV, new: int, rows: int) -> StepBinding:
        """That of a single token is kept: making one takes a third of such a step's time."""
        if new > 1:
            return self._bind(kv, new, rows)
        if kv.binding is None:
            kv.binding = self._bind(kv, new, rows)
        bound: StepBinding = kv.binding
        return bound

    def _bind(self, kv: DeviceKV, new: int, rows: int) -> StepBinding:
        return StepBinding(self._session, kv, new, rows, self._spec.vocab_size, self._limits.rope_switch is not None)

    def _release(self) -> None:
        self._session = None
