"""A decoder over OpenVINO's stateful graphs, for attention that PagedAttention cannot compute (soft-capped scores).

Every sequence has an inference request, whose variables are its dense KV cache, and the steps of a batch run one
after another. Forking and cropping copy the cache. Slower than :mod:`devices.openvino_paged`, which is preferred
wherever the graph allows (:func:`devices.openvino_open.open_openvino`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from devices.base import DecoderLimits, DecoderOptions, DecoderSpec, Snapshot, Step
from devices.errors import DeviceError, EngineError, OutOfKVCache
from devices.kv_types import choose_kv_type
from devices.openvino_graph import (
    ROWS,
    compile_model,
    engine_errors,
    gather_rows,
    new_core,
    precision_defaults,
    read_model,
    release_model,
    rope_offset,
)
from devices.sequence_decoder import SequenceDecoder
from devices.steps import check_batch, check_follows, check_rope_switch, snapshot_stop


class DenseSequence:
    """A request and its variables. See :class:`devices.base.DecoderSequence`."""

    def __init__(self, decoder: OpenVinoDenseDecoder, request: Any, on_long: bool) -> None:
        self._decoder = decoder
        self._request = request
        self._length = 0
        self.on_long = on_long
        """On the long rotary factors (longrope)."""

    @property
    def request(self) -> Any:
        """DeviceError when the sequence or its decoder is closed."""
        if self._request is None:
            raise DeviceError("the sequence is closed; open a new one")
        self._decoder.check_open()
        return self._request

    @property
    def length(self) -> int:
        return self._length if self.request else 0

    @property
    def nbytes(self) -> int:
        return self.length * self._decoder.limits.kv_bytes_per_token

    def grow(self, count: int) -> None:
        """Note that the request has taken ``count`` more tokens."""
        self._length += count

    def crop(self, length: int) -> int:
        self._check_length(length)
        if length < self._length:
            self._write(length, [cache[:, :, :length] for cache in self._read()])
        return length

    def fork(self, length: int) -> DenseSequence:
        self._check_length(length)
        child = self._decoder.new_fork(self.on_long, length)
        try:
            child._write(length, [cache[:, :, :length] for cache in self._read()] if length else [])
        except EngineError:
            child.close()
            raise
        return child

    def snapshot(self, start: int = 0, stop: int | None = None) -> Snapshot:
        stop = snapshot_stop(start, stop, self.length)
        return Snapshot(stop - start, tuple(cache[:, :, start:stop].copy() for cache in self._read()), start)

    def restore(self, snapshot: Snapshot) -> None:
        check_follows(snapshot, self.length, self._decoder.limits)
        check_rope_switch(self._length + snapshot.length, self._decoder.limits.rope_switch, self.on_long)
        self._decoder.check_snapshot(snapshot)
        joined = [np.concatenate(pair, axis=2) for pair in zip(self._read(), snapshot.arrays, strict=True)]
        self._write(self._length + snapshot.length, joined)

    def close(self) -> None:
        request, self._request = self._request, None
        if request is not None:
            self._decoder.forget(self, request)

    def _check_length(self, length: int) -> None:
        if not 0 <= length <= self.length:
            raise ValueError(f"length {length} is not within 0..{self._length}, the tokens held")

    def _read(self) -> list[NDArray[np.generic]]:
        """Copies of all caches, (1, kv_heads, length, head_dim): keys and values, layer by layer."""
        if self._length == 0:
            return [np.zeros(shape, np.float32) for shape in self._decoder.cache_shapes(0)]
        with engine_errors("reading the KV cache"):
            return [np.array(state.state.data) for state in self._decoder.states(self.request)]

    def _write(self, length: int, caches: list[NDArray[np.generic]]) -> None:
        with engine_errors("writing the KV cache"):
            if length == 0:
                self.request.reset_state()
            else:
                for state, cache in zip(self._decoder.states(self.request), caches, strict=True):
                    state.state = self._decoder.tensor(cache)
        self._length = length


class OpenVinoDenseDecoder(SequenceDecoder[DenseSequence]):
    """Implements :class:`devices.base.Decoder` on OpenVINO's ``device``, one step at a time.

    Caches are float32 and grow with their sequences; ``kv_tokens`` bounds their sum.
    EngineError when OpenVINO cannot open ``spec.model``.
    """

    def __init__(self, spec: DecoderSpec, options: DecoderOptions, device: str = "CPU") -> None:
        if options.kv_tokens is not None and options.kv_tokens < 1:
            raise ValueError(f"kv_tokens must be at least 1, not {options.kv_tokens}")
        choose_kv_type(f"openvino:{device.lower()}, with this model's attention,", options.kv_type, ("float32",))
        ov, core = new_core()
        model = read_model(core, spec.model)
        self._ov = ov
        self._spec = spec
        self._rope_offset = rope_offset(model, spec)
        gather_rows(model, axis=1)
        defaults = {"INFERENCE_PRECISION_HINT": precision_defaults(model)["INFERENCE_PRECISION_HINT"]}
        self._compiled = compile_model(core, model, device, options, defaults)
        self._spare: list[Any] = []
        limits = DecoderLimits(
            max_context=spec.max_context,
            max_prompt=spec.max_context,
            max_sequences=options.max_sequences,
            prefill_chunk=options.prefill_chunk,
            kv_tokens=spec.max_context if options.kv_tokens is None else options.kv_tokens,
            kv_bytes_per_token=2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * 4,
            rope_switch=spec.rope_switch,
        )
        super().__init__(f"openvino:{device.lower()}", limits)

    # ---- sequences

    def new_sequence(self, expected: int = 0) -> DenseSequence:
        return self._open_sequence(self._starts_on_long(expected))

    def new_fork(self, on_long: bool, length: int) -> DenseSequence:
        """An empty sequence that will be given ``length`` tokens of another."""
        self._check_place()
        self._check_room(length)
        return self._open_sequence(on_long)

    def _open_sequence(self, on_long: bool) -> DenseSequence:
        self._check_place()
        with engine_errors("creating an inference request"):
            request = self._spare.pop() if self._spare else self._compiled.create_infer_request()
        sequence = DenseSequence(self, request, on_long)
        self._sequences.add(sequence)
        return sequence

    def _check_room(self, tokens: int) -> None:
        held = sum(sequence.length for sequence in self._sequences)
        if held + tokens > self._limits.kv_tokens:
            raise OutOfKVCache(
                f"{tokens} more tokens do not fit: {held} of {self._limits.kv_tokens} are held; close or crop "
                "sequences, or open the device with more kv_tokens"
            )

    def forget(self, sequence: DenseSequence, request: Any) -> None:
        """Keep a closing sequence's request for the next one."""
        self._sequences.discard(sequence)
        if self._open:
            with engine_errors("resetting a sequence"):
                request.reset_state()
            self._spare.append(request)

    def check_snapshot(self, snapshot: Snapshot) -> None:
        """EngineError or OutOfKVCache unless it can be restored."""
        if [array.shape for array in snapshot.arrays] != self.cache_shapes(snapshot.length) or any(
            array.dtype != np.float32 for array in snapshot.arrays
        ):
            raise EngineError("the snapshot was taken from another model or with another KV precision; prefill instead")
        self._check_room(snapshot.length)

    def cache_shapes(self, length: int) -> list[tuple[int, ...]]:
        """Of every key and value, layer by layer."""
        return [(1, self._spec.num_kv_heads, length, self._spec.head_dim)] * (2 * self._spec.num_layers)

    def states(self, request: Any) -> list[Any]:
        """The variables of a request: keys and values, layer by layer."""

        def place(state: Any) -> tuple[int, str]:
            _, layer, _, _, kind = state.name.split(".")  # past_key_values.N.keypresent.N.key
            return int(layer), kind

        return sorted(request.query_state(), key=place)

    def tensor(self, values: NDArray[np.generic]) -> Any:
        return self._ov.Tensor(np.ascontiguousarray(values))

    # ---- running

    def forward(self, batch: Sequence[Step]) -> list[NDArray[np.float32]]:
        self.check_open()
        sequences = [self._own(step) for step in batch]
        check_batch(batch, self._limits, self._spec.vocab_size)
        for sequence, step in zip(sequences, batch, strict=True):
            check_rope_switch(sequence.length + step.tokens.size, self._limits.rope_switch, sequence.on_long)
        self._check_room(sum(step.tokens.size for step in batch))
        return [self._run(sequence, step) for sequence, step in zip(sequences, batch, strict=True)]

    def _run(self, sequence: DenseSequence, step: Step) -> NDArray[np.float32]:
        count, start = step.tokens.size, sequence.length
        first = start + (self._rope_offset if sequence.on_long else 0)
        inputs: dict[str, NDArray[np.generic]] = {
            "input_ids": step.tokens.astype(np.int64)[None],
            "attention_mask": np.ones((1, start + count), np.int64),
            "position_ids": np.arange(first, first + count, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
            ROWS: np.arange(count - step.rows, count, dtype=np.int64),
        }
        request = sequence.request
        with engine_errors("running a step"):
            for name, values in inputs.items():
                request.set_tensor(name, self._ov.Tensor(values))
            with self._stopwatch:
                request.infer()
            logits = np.array(request.get_output_tensor(0).data, np.float32)
        sequence.grow(count)
        return logits.reshape(step.rows, self._spec.vocab_size)

    # ---- the end

    def check_integrity(self) -> None:
        held = sum(sequence.length for sequence in self._sequences)
        if held > self._limits.kv_tokens or len(self._sequences) > self._limits.max_sequences:
            raise AssertionError(f"{held} tokens in {len(self._sequences)} sequences pass {self._limits}")
        for sequence in self._sequences:
            for state in self.states(sequence.request) if sequence.length else []:
                if state.state.shape[2] != sequence.length:
                    raise AssertionError(f"{state.name} holds {state.state.shape[2]} tokens, not {sequence.length}")

    def _release(self) -> None:
        self._spare.clear()
        release_model(self._compiled)
        self._compiled = None
