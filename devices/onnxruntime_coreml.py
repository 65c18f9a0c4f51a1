"""A decoder over graphs of static shapes, which CoreML takes; to test it without a Mac, on ONNX Runtime's CPU provider.

The graphs are described in :mod:`exporters.onnx_coreml_builder`: one reads a fixed number of prompt tokens, the other
one token. Every sequence has its KV cache in host memory, of the capacity that the graphs were made for; the steps of a
batch run one after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from devices.base import DecoderLimits, DecoderOptions, DecoderSpec, Snapshot, Step
from devices.errors import DeviceError, EngineError, OutOfKVCache
from devices.kv_types import KVType, choose_kv_type
from devices.lazy_memory import lazy_memory
from devices.onnxruntime_session import engine_errors, new_session
from devices.sequence_decoder import SequenceDecoder
from devices.steps import check_batch, check_follows, check_rope_switch, snapshot_stop

DECODE_FILE = "decode.onnx"
_HIDDEN = -3e4
"""Added to scores that do not count; float16 has no smaller number by much."""
_TYPES: dict[str, tuple[Any, KVType]] = {
    "tensor(float16)": (np.float16, "float16"),
    "tensor(float)": (np.float32, "float32"),
}


def coreml_options(cache_dir: Path | None) -> dict[str, str]:
    """Of the provider (https://onnxruntime.ai/docs/execution-providers/CoreML-ExecutionProvider.html)."""
    options = {"ModelFormat": "MLProgram", "MLComputeUnits": "ALL", "RequireStaticInputShapes": "1"}
    return options if cache_dir is None else {**options, "ModelCacheDirectory": str(cache_dir)}


class CoreMLSequence:
    """See :class:`devices.base.DecoderSequence`."""

    def __init__(self, decoder: OnnxRuntimeCoreMLDecoder, on_long: bool) -> None:
        self._decoder: OnnxRuntimeCoreMLDecoder | None = decoder
        self.caches = decoder.new_caches()
        """(kv_heads, capacity, head_dim): keys and values, layer by layer."""
        self._length = 0
        self.on_long = on_long
        """On the long rotary factors (longrope)."""

    @property
    def decoder(self) -> OnnxRuntimeCoreMLDecoder:
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

    def append(self, arrays: Sequence[NDArray[np.generic]], count: int) -> None:
        """The first ``count`` tokens of ``arrays``, (kv_heads, …, head_dim) each."""
        for cache, array in zip(self.caches, arrays, strict=True):
            cache[:, self._length : self._length + count] = array[:, :count]
        self._length += count

    def crop(self, length: int) -> int:
        self._check_length(length)
        self._length = length
        return length

    def fork(self, length: int) -> CoreMLSequence:
        self._check_length(length)
        child = self.decoder.fork(self, length)
        child.append(self.caches, length)
        return child

    def snapshot(self, start: int = 0, stop: int | None = None) -> Snapshot:
        stop = snapshot_stop(start, stop, self.length)
        return Snapshot(stop - start, tuple(cache[:, start:stop].copy() for cache in self.caches), start)

    def restore(self, snapshot: Snapshot) -> None:
        self.decoder.check_snapshot(self, snapshot)
        self.append(snapshot.arrays, snapshot.length)

    def close(self) -> None:
        decoder, self._decoder = self._decoder, None
        if decoder is not None:
            decoder.forget(self)
            self.caches = []

    def _check_length(self, length: int) -> None:
        if not 0 <= length <= self.length:
            raise ValueError(f"length {length} is not within 0..{self._length}, the tokens held")


class OnnxRuntimeCoreMLDecoder(SequenceDecoder[CoreMLSequence]):
    """Implements :class:`devices.base.Decoder`. ``emulated``: on the CPU's provider.

    Of the rows of logits asked for, all but the first take a step of their own. DeviceUnavailable with another KV cache
    than the graph's, EngineError if the model is refused.
    """

    def __init__(self, spec: DecoderSpec, options: DecoderOptions, emulated: bool = False) -> None:
        name = "onnxruntime:coreml-emulated" if emulated else "onnxruntime:coreml"
        providers: list[Any] = ["CPUExecutionProvider"]
        if not emulated:
            providers.insert(0, ("CoreMLExecutionProvider", coreml_options(options.cache_dir)))
        self._sessions = [
            new_session(path, options, providers) for path in (spec.model, spec.model.with_name(DECODE_FILE))
        ]
        shapes = {each.name: each for each in self._sessions[0].get_inputs()}
        past = shapes.get("past.0.key")
        if past is None or past.type not in _TYPES:
            raise EngineError(f"{spec.model} was not exported for CoreML; export it with --engine onnx-coreml")
        self._dtype, kv_type = _TYPES[past.type]
        choose_kv_type(name, options.kv_type, (kv_type,))
        self._step, self._capacity = shapes["input_ids"].shape[0], past.shape[1]
        self._windows = {key: _window(key) for key in shapes if key.startswith("mask")}
        kv_tokens = self._capacity if options.kv_tokens is None else options.kv_tokens
        context = min(spec.max_context, self._capacity, kv_tokens)
        limits = DecoderLimits(
            max_context=context,
            max_prompt=context,
            max_sequences=options.max_sequences,
            prefill_chunk=options.prefill_chunk,
            kv_tokens=kv_tokens,
            kv_bytes_per_token=2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * np.dtype(self._dtype).itemsize,
            rope_switch=spec.rope_switch,
        )
        super().__init__(name, limits)
        self._spec = spec

    # ---- sequences

    def new_caches(self) -> list[NDArray[np.generic]]:
        """Of one sequence; the system gives their memory when it is written to."""
        spec = self._spec
        shape = (spec.num_kv_heads, self._capacity, spec.head_dim)
        size = int(np.prod(shape)) * np.dtype(self._dtype).itemsize
        return [np.frombuffer(lazy_memory(size), self._dtype).reshape(shape) for _ in range(2 * spec.num_layers)]

    def new_sequence(self, expected: int = 0) -> CoreMLSequence:
        return self._register(self._starts_on_long(expected))

    def _register(self, on_long: bool) -> CoreMLSequence:
        self._check_place()
        sequence = CoreMLSequence(self, on_long)
        self._sequences.add(sequence)
        return sequence

    def fork(self, source: CoreMLSequence, length: int) -> CoreMLSequence:
        """An empty one, like ``source``, with room for ``length`` tokens."""
        self._check_place()
        self._check_room(length)
        return self._register(source.on_long)

    def check_snapshot(self, sequence: CoreMLSequence, snapshot: Snapshot) -> None:
        """EngineError, ContextOverflow or OutOfKVCache unless ``sequence`` can take it."""
        spec = self._spec
        check_follows(snapshot, sequence.length, self._limits)
        form = ((spec.num_kv_heads, snapshot.length, spec.head_dim), np.dtype(self._dtype))
        if [(array.shape, array.dtype) for array in snapshot.arrays] != [form] * (2 * spec.num_layers):
            raise EngineError("the snapshot was taken from another model or device; prefill the tokens instead")
        check_rope_switch(sequence.length + snapshot.length, self._limits.rope_switch, sequence.on_long)
        self._check_room(snapshot.length)

    def forget(self, sequence: CoreMLSequence) -> None:
        """A sequence is closing."""
        self._sequences.discard(sequence)

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
        return [self._run(sequence, step) for sequence, step in zip(sequences, batch, strict=True)]

    def _run(self, sequence: CoreMLSequence, step: Step) -> NDArray[np.float32]:
        """What comes before the second row of logits is read as a prompt, then a token at a time."""
        tokens, rows = step.tokens, []
        read = tokens.size - max(step.rows - 1, 0)
        for start in range(0, read, self._step):
            last = self._call(sequence, tokens[start : min(start + self._step, read)])
        rows += [last] * (step.rows > 0)
        rows += [self._call(sequence, tokens[place : place + 1]) for place in range(read, tokens.size)]
        return np.concatenate(rows) if rows else np.empty((0, self._spec.vocab_size), np.float32)

    def _call(self, sequence: CoreMLSequence, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """(1, vocab): logits after the last of ``tokens``, which are filled up to the graph's number."""
        count, held = tokens.size, sequence.length
        session = self._sessions[count == 1]
        size = 1 if count == 1 else self._step
        ids = np.zeros((size, 1), np.int64)
        ids[:count, 0] = tokens
        first = held + (self._spec.max_context if sequence.on_long else 0)
        # what fills up may lie past the tables' end
        positions = np.minimum(np.arange(first, first + size), first + count - 1)[:, None]
        inputs: dict[str, NDArray[np.generic]] = {
            "input_ids": ids,
            "position_ids": positions,
            "row_index": np.array([[count - 1]]),
        }
        inputs |= {name: self._mask(held, size, window) for name, window in self._windows.items()}
        names = [f"{layer}.{kind}" for layer in range(self._spec.num_layers) for kind in ("key", "value")]
        inputs |= {f"past.{name}": cache for name, cache in zip(names, sequence.caches, strict=True)}
        with engine_errors("running the model"), self._stopwatch:
            logits, *new = session.run(["logits", *(f"new.{name}" for name in names)], inputs)
        sequence.append(new, count)
        return np.asarray(logits, np.float32)

    def _mask(self, held: int, size: int, window: int | None) -> NDArray[np.generic]:
        """(size, capacity + size): 0 for what a token sees, cached tokens first."""
        own = np.arange(held, held + size)[:, None]
        key = np.concatenate([np.arange(self._capacity), np.arange(held, held + size)])[None, :]
        there = np.concatenate([np.arange(self._capacity) < held, np.ones(size, bool)])[None, :]
        seen = there & (key <= own) & (own - key < (window or held + size))
        return np.where(seen, 0, _HIDDEN).astype(self._dtype)

    # ---- the end

    def check_integrity(self) -> None:
        held = sum(sequence.length for sequence in self._sequences)
        if held > self._limits.kv_tokens or len(self._sequences) > self._limits.max_sequences:
            raise AssertionError(f"{len(self._sequences)} sequences hold {held} tokens, of at most {self._limits}")

    def _release(self) -> None:
        self._sessions.clear()


def _window(name: str) -> int | None:
    """Of the layers with the mask of that name."""
    _, _, window = name.partition(".")
    return int(window) if window else None
