"""A decoder over ONNX Runtime's WebGPU provider, which comes as a plugin; the KV cache lives in the GPU's memory.

The graph is that of :mod:`exporters.onnx_builder`. Every sequence has a dense cache of its own, past and present in one
buffer, and the steps of a batch run one after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from devices.base import DecoderLimits, DecoderOptions, DecoderSpec, Snapshot, Step
from devices.device_kv import DeviceKV
from devices.errors import DeviceError, EngineError, OutOfKVCache
from devices.kv_types import choose_kv_type
from devices.onnxruntime_session import engine_errors, open_session
from devices.plugins import on_processor, plugin_memory
from devices.sequence_decoder import SequenceDecoder
from devices.steps import check_batch, check_follows, check_rope_switch, snapshot_stop

NAME = "onnxruntime:webgpu"
_SOFTWARE_STEP = 31
"""Tokens run at once on a software adapter: the provider's kernels for 32 and more, right on a GPU, give wrong numbers
there (SwiftShader of Chromium 156, onnxruntime-ep-webgpu 0.4.0)."""


class StepBinding:
    """What a step of ``new`` tokens reads and writes; of another one only the values differ."""

    def __init__(self, session: Any, kv: DeviceKV, new: int, rows: int, vocab_size: int, positions: bool) -> None:
        """``positions``: the graph has an input ``position_ids``."""
        self.capacity = kv.capacity
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


class WebGpuSequence:
    """See :class:`devices.base.DecoderSequence`."""

    def __init__(self, decoder: OnnxRuntimeWebGpuDecoder, kv: DeviceKV, on_long: bool) -> None:
        self._decoder: OnnxRuntimeWebGpuDecoder | None = decoder
        self.kv = kv
        self._length = 0
        self.binding: StepBinding | None = None
        """Of its steps of a single token."""
        self.on_long = on_long
        """On the long rotary factors (longrope)."""

    @property
    def decoder(self) -> OnnxRuntimeWebGpuDecoder:
        """DeviceError when the sequence or its decoder is closed."""
        if self._decoder is None:
            raise DeviceError("the sequence is closed; open a new one")
        self._decoder.check_open()
        return self._decoder

    @property
    def length(self) -> int:
        return self._length if self.decoder else 0

    @property
    def nbytes(self) -> int:
        return self.length * self.decoder.limits.kv_bytes_per_token

    def grow(self, count: int) -> None:
        """Note that the cache holds ``count`` more tokens."""
        self._length += count

    def crop(self, length: int) -> int:
        self._check_length(length)
        self._length = length
        return length

    def fork(self, length: int) -> WebGpuSequence:
        self._check_length(length)
        child = self.decoder.fork(self, length)
        child._length = length
        return child

    def snapshot(self, start: int = 0, stop: int | None = None) -> Snapshot:
        stop = snapshot_stop(start, stop, self.length)
        with engine_errors("reading the KV cache"):
            return Snapshot(stop - start, self.kv.read(start, stop), start)

    def restore(self, snapshot: Snapshot) -> None:
        self.decoder.restore(self, snapshot)

    def close(self) -> None:
        decoder, self._decoder = self._decoder, None
        if decoder is not None:
            decoder.forget(self)

    def _check_length(self, length: int) -> None:
        if not 0 <= length <= self.length:
            raise ValueError(f"length {length} is not within 0..{self._length}, the tokens held")


class OnnxRuntimeWebGpuDecoder(SequenceDecoder[WebGpuSequence]):
    """Implements :class:`devices.base.Decoder`; everything is computed in float32.

    DeviceUnavailable without the plugin and hardware for it, EngineError if the model is refused.
    """

    def __init__(self, spec: DecoderSpec, options: DecoderOptions) -> None:
        choose_kv_type(NAME, options.kv_type, ("float32",))
        kv_tokens = spec.max_context if options.kv_tokens is None else options.kv_tokens
        context = min(spec.max_context, kv_tokens)
        limits = DecoderLimits(
            max_context=context,
            max_prompt=context,
            max_sequences=options.max_sequences,
            prefill_chunk=options.prefill_chunk,
            kv_tokens=kv_tokens,
            kv_bytes_per_token=2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * 4,
            rope_switch=spec.rope_switch,
        )
        super().__init__(NAME, limits)
        self._spec = spec
        self._session: Any = open_session(spec, options, NAME)
        self._memory = plugin_memory(NAME)
        self._longest = _SOFTWARE_STEP if on_processor(NAME) else options.prefill_chunk

    # ---- sequences

    def new_sequence(self, expected: int = 0) -> WebGpuSequence:
        return self._register(self._starts_on_long(expected))

    def _register(self, on_long: bool) -> WebGpuSequence:
        self._check_place()
        spec, most = self._spec, self._limits.max_context
        kv = DeviceKV(self._memory, spec.num_layers, spec.num_kv_heads, spec.head_dim, most)
        sequence = WebGpuSequence(self, kv, on_long)
        self._sequences.add(sequence)
        return sequence

    def fork(self, source: WebGpuSequence, length: int) -> WebGpuSequence:
        self._check_room(length)
        child = self._register(source.on_long)
        try:
            with engine_errors("copying the KV cache"):
                child.kv.copy_of(source.kv)
        except EngineError:
            child.close()
            raise
        return child

    def restore(self, sequence: WebGpuSequence, snapshot: Snapshot) -> None:
        spec = self._spec
        check_follows(snapshot, sequence.length, self._limits)
        form = [((spec.num_kv_heads, snapshot.length, spec.head_dim), np.dtype(np.float32))] * (2 * spec.num_layers)
        if [(array.shape, array.dtype) for array in snapshot.arrays] != form:
            raise EngineError("the snapshot was taken from another model or device; prefill the tokens instead")
        check_rope_switch(sequence.length + snapshot.length, self._limits.rope_switch, sequence.on_long)
        self._check_room(snapshot.length)
        with engine_errors("writing the KV cache"):
            sequence.kv.reserve(sequence.length + snapshot.length, sequence.length)
            sequence.kv.write(sequence.length, snapshot.arrays)
        sequence.grow(snapshot.length)

    def forget(self, sequence: WebGpuSequence) -> None:
        """A sequence is closing."""
        self._sequences.discard(sequence)
        sequence.binding = None
        sequence.kv.close()

    def _check_room(self, tokens: int) -> None:
        held = sum(sequence.length for sequence in self._sequences)
        if held + tokens > self._limits.kv_tokens:
            raise OutOfKVCache(
                f"{tokens} more tokens do not fit the KV cache of {self._limits.kv_tokens}, {held} are held; close or "
                "crop a sequence"
            )

    # ---- running

    def forward(self, batch: Sequence[Step]) -> list[NDArray[np.float32]]:
        self.check_open()
        check_batch(batch, self._limits, self._spec.vocab_size)
        sequences = [self._own(step) for step in batch]
        for sequence, step in zip(sequences, batch, strict=True):
            check_rope_switch(sequence.length + step.tokens.size, self._limits.rope_switch, sequence.on_long)
        self._check_room(sum(step.tokens.size for step in batch))
        return [self._run_whole(sequence, step) for sequence, step in zip(sequences, batch, strict=True)]

    def _run_whole(self, sequence: WebGpuSequence, step: Step) -> NDArray[np.float32]:
        count, longest = step.tokens.size, self._longest
        if count <= longest:
            return self._run(sequence, step)
        rows = []
        for start in range(0, count, longest):
            part = step.tokens[start : start + longest]
            wanted = min(max(step.rows - (count - start - len(part)), 0), len(part))
            rows.append(self._run(sequence, Step(step.sequence, part, wanted)))
        return np.concatenate(rows)

    def _run(self, sequence: WebGpuSequence, step: Step) -> NDArray[np.float32]:
        held, new = sequence.length, step.tokens.size
        with engine_errors("running the model on WebGPU"):
            sequence.kv.reserve(held + new, held)
            bound = self._binding(sequence, new, max(step.rows, 1))  # the provider has no shape for no row
            bound.ids[0] = step.tokens
            bound.held[0] = bound.total[()] = held + new
            bound.held[0] -= 1
            if self._limits.rope_switch is not None:
                start = held + (self._spec.max_context if sequence.on_long else 0)
                bound.positions[0] = np.arange(start, start + new)
            bound.bind_inputs()
            with self._stopwatch:
                self._session.run_with_iobinding(bound.binding)
        sequence.grow(new)
        return bound.logits[len(bound.logits) - step.rows :].copy()

    def _binding(self, sequence: WebGpuSequence, new: int, rows: int) -> StepBinding:
        """That of a single token is kept: making one takes a third of such a step's time."""
        if new > 1:
            return self._bind(sequence.kv, new, rows)
        kept = sequence.binding
        if kept is None or kept.capacity != sequence.kv.capacity:
            kept = sequence.binding = self._bind(sequence.kv, new, rows)
        return kept

    def _bind(self, kv: DeviceKV, new: int, rows: int) -> StepBinding:
        return StepBinding(self._session, kv, new, rows, self._spec.vocab_size, self._limits.rope_switch is not None)

    # ---- the end

    def check_integrity(self) -> None:
        held = sum(sequence.length for sequence in self._sequences)
        if held > self._limits.kv_tokens or len(self._sequences) > self._limits.max_sequences:
            raise AssertionError(f"{len(self._sequences)} sequences hold {held} tokens, of at most {self._limits}")

    def _release(self) -> None:
        self._session = None
