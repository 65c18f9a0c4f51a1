"""ONNX Runtime over graphs with GroupQueryAttention: past and present are one buffer, bound once per range of rows.

The graph's inputs are described in :mod:`exporters.onnx_builder`. Every sequence has a row of the dense KV cache
(:mod:`devices.kv_rows`); a batch is a range of rows (:mod:`devices.row_pool`). ``query_seqlens`` (ONNX Runtime 1.32)
says how many tokens of each row are real, so rows of a range may be idle and short steps may be padded.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from devices.base import DecoderLimits, DecoderOptions, DecoderSequence, DecoderSpec, Snapshot, Step
from devices.errors import (
    DeviceError,
    EngineError,
    OutOfKVCache,
    OutOfSequences,
)
from devices.kv_rows import KVRows
from devices.kv_types import choose_kv_type
from devices.onnxruntime_binding import LogitsBuffer, RowsBinding
from devices.onnxruntime_session import engine_errors, open_session
from devices.plugins import PLUGINS
from devices.row_pool import RowPool
from devices.steps import check_batch, check_follows, check_rope_switch, snapshot_stop
from devices.stopwatch import Stopwatch

_PADDED_STEP = 16
"""Steps up to this length (drafts being verified) may be padded to each other's length and run as one call."""


class OnnxRuntimeSequence:
    """A row of the decoder's KV cache; made by :meth:`OnnxRuntimeDecoder.new_sequence`."""

    def __init__(self, decoder: OnnxRuntimeDecoder, key: int, long_rope: bool) -> None:
        self._decoder = decoder
        self._key = key
        self._length = 0
        self._long_rope = long_rope
        self._open = True

    @property
    def length(self) -> int:
        self._check_open()
        return self._length

    @property
    def nbytes(self) -> int:
        return self.length * self._decoder.limits.kv_bytes_per_token

    def crop(self, length: int) -> int:
        self._check_open()
        self._check_length(length)
        self._decoder._set_length(self, length)
        return length

    def fork(self, length: int) -> OnnxRuntimeSequence:
        self._check_open()
        self._check_length(length)
        return self._decoder._fork(self, length)

    def snapshot(self, start: int = 0, stop: int | None = None) -> Snapshot:
        stop = snapshot_stop(start, stop, self.length)
        return Snapshot(stop - start, self._decoder._read(self, start, stop), start)

    def restore(self, snapshot: Snapshot) -> None:
        self._check_open()
        self._decoder._restore(self, snapshot)

    def close(self) -> None:
        if self._open:
            self._open = False
            self._decoder._close_sequence(self)
            self._length = 0

    def _check_open(self) -> None:
        if not self._open:
            raise DeviceError("the sequence is closed; open a new one with Decoder.new_sequence()")

    def _check_length(self, length: int) -> None:
        if not 0 <= length <= self._length:
            raise ValueError(f"length {length} is outside 0..{self._length}, the tokens the sequence holds")


class OnnxRuntimeDecoder:
    """A :class:`devices.base.Decoder` on execution providers over host memory: the CPU's, and OpenVINO's plugin, which
    leaves attention to it."""

    def __init__(self, spec: DecoderSpec, options: DecoderOptions, device: str = "onnxruntime:cpu") -> None:
        """DeviceUnavailable if ``device`` cannot be used, EngineError if the model is refused."""
        self._device = device
        self._copied = device in PLUGINS
        choose_kv_type(device, options.kv_type, ("float32",))
        max_context = spec.max_context if options.kv_tokens is None else min(spec.max_context, options.kv_tokens)
        kv_bytes = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * np.dtype(np.float32).itemsize
        self._limits = DecoderLimits(
            max_context=max_context,
            max_prompt=max_context,
            max_sequences=options.max_sequences,
            prefill_chunk=options.prefill_chunk,
            kv_tokens=spec.max_context if options.kv_tokens is None else options.kv_tokens,
            kv_bytes_per_token=kv_bytes,
            rope_switch=spec.rope_switch,
        )
        self._spec = spec
        self._session = open_session(spec, options, device)
        try:
            # a padded step reaches past the last token that counts
            tokens = max_context + _PADDED_STEP
            rows = options.max_sequences + options.batch_invariant
            self._kv = KVRows(rows, spec.num_layers, spec.num_kv_heads, tokens, spec.head_dim)
        except (OSError, MemoryError, ValueError) as error:
            raise EngineError(
                f"no address space for the KV cache of {options.max_sequences} sequences of {max_context} tokens "
                f"({error}); lower max_sequences or kv_tokens"
            ) from error
        self._stopwatch = Stopwatch()
        self._pool = RowPool(options.max_sequences)
        self._batch_invariant = options.batch_invariant
        self._sequences: dict[int, OnnxRuntimeSequence] = {}
        self._keys = itertools.count()
        self._logits = LogitsBuffer(spec.vocab_size)
        self._bindings: dict[tuple[int, int], RowsBinding] = {}

    @property
    def limits(self) -> DecoderLimits:
        return self._limits

    @property
    def device(self) -> str:
        return self._device

    @property
    def engine_seconds(self) -> float:
        return self._stopwatch.seconds

    def new_sequence(self, expected: int = 0) -> OnnxRuntimeSequence:
        switch = self._limits.rope_switch
        return self._new_sequence(long_rope=switch is not None and expected > switch)

    def _new_sequence(self, long_rope: bool) -> OnnxRuntimeSequence:
        self._check_open()
        if len(self._pool) == self._limits.max_sequences:
            raise OutOfSequences(
                f"{self._limits.max_sequences} sequences are open, as many as max_sequences allows; close one first"
            )
        key = next(self._keys)
        self._pool.open(key)
        self._sequences[key] = OnnxRuntimeSequence(self, key, long_rope)
        return self._sequences[key]

    def forward(self, batch: Sequence[Step]) -> list[NDArray[np.float32]]:
        sequences = self._check(batch)
        results: list[NDArray[np.float32] | None] = [None] * len(batch)
        for group in _group([len(step.tokens) for step in batch], pad=not self._batch_invariant):
            outputs = self._run([sequences[i] for i in group], [batch[i] for i in group])
            for i, output in zip(group, outputs, strict=True):
                results[i] = output
        return [result for result in results if result is not None]

    def _check(self, batch: Sequence[Step]) -> list[OnnxRuntimeSequence]:
        """Everything that can refuse the batch, before anything runs."""
        self._check_open()
        sequences = [self._own(step.sequence) for step in batch]
        check_batch(batch, self._limits, self._spec.vocab_size)
        for sequence, step in zip(sequences, batch, strict=True):
            check_rope_switch(sequence.length + len(step.tokens), self._limits.rope_switch, sequence._long_rope)
        self._check_room(sum(len(step.tokens) for step in batch))
        return sequences

    def _own(self, sequence: DecoderSequence) -> OnnxRuntimeSequence:
        if not isinstance(sequence, OnnxRuntimeSequence) or sequence._decoder is not self:
            raise ValueError("the sequence belongs to another decoder")
        sequence._check_open()
        return sequence

    def _check_room(self, tokens: int) -> None:
        held = sum(sequence.length for sequence in self._sequences.values())
        if held + tokens > self._limits.kv_tokens:
            raise OutOfKVCache(
                f"{tokens} more tokens do not fit the KV cache of {self._limits.kv_tokens}, {held} are held; "
                "close or crop a sequence"
            )

    def _run(self, sequences: list[OnnxRuntimeSequence], steps: list[Step]) -> list[NDArray[np.float32]]:
        """One call of the engine over steps of (nearly) equal length."""
        width = max(len(step.tokens) for step in steps)
        first, count = self._arrange(sequences, idle=max(1, len(steps) // 4) if width == 1 else 0)
        if self._batch_invariant and count * width == 1:
            count = 2  # an idle row beside it

        wanted = sum(step.rows for step in steps)
        # the vocabulary projection, too, has a kernel of its own for one row
        extra = 1 if self._batch_invariant and wanted == 1 else 0
        with engine_errors("running the model"):
            bound = self._binding(first, count)
            bound.prepare(width, wanted + extra)
            total, end = width, 0
            for sequence, step in zip(sequences, steps, strict=True):
                place, n = self._pool.row(sequence._key) - first, len(step.tokens)
                bound.ids[place, :n] = step.tokens
                if self._limits.rope_switch is not None:
                    start = sequence._length + (self._spec.max_context if sequence._long_rope else 0)
                    bound.positions[place, :n] = np.arange(start, start + n)
                bound.held[place] = sequence._length + n - 1
                bound.new[place] = n
                total = max(total, sequence._length + n)
                after = place * width + n
                bound.row_index[end : end + step.rows] = range(after - step.rows, after)
                end += step.rows
            bound.row_index[end:] = 0
            bound.total[()] = total
            if self._copied:
                bound.bind_inputs()
            with self._stopwatch:
                self._session.run_with_iobinding(bound.binding)

        results, end = [], 0
        for sequence, step in zip(sequences, steps, strict=True):
            sequence._length += len(step.tokens)
            results.append(bound.logits[end : end + step.rows].copy())
            end += step.rows
        return results

    def _arrange(self, sequences: list[OnnxRuntimeSequence], idle: int) -> tuple[int, int]:
        window = self._pool.arrange([s._key for s in sequences], lambda key: self._sequences[key].length, idle)
        lengths = {self._pool.row(key): sequence.length for key, sequence in self._sequences.items()}
        for move in window.moves:  # lengths are by row, after the move
            length = lengths[move.target]
            if move.exchange:
                self._kv.exchange(move.source, length, move.target, lengths[move.source])
            else:
                self._kv.copy(move.source, move.target, length)
                self._kv.release(move.source, 0, length)
        return window.first, window.count

    def _binding(self, first: int, count: int) -> RowsBinding:
        if (first, count) not in self._bindings:
            positions = self._limits.rope_switch is not None
            self._bindings[first, count] = RowsBinding(
                self._session, self._kv, self._logits, first, count, positions=positions, copied=self._copied
            )
        return self._bindings[first, count]

    def _set_length(self, sequence: OnnxRuntimeSequence, length: int) -> None:
        self._kv.release(self._pool.row(sequence._key), length, sequence._length)
        sequence._length = length

    def _fork(self, source: OnnxRuntimeSequence, length: int) -> OnnxRuntimeSequence:
        self._check_room(length)
        fork = self._new_sequence(source._long_rope)
        self._kv.copy(self._pool.row(source._key), self._pool.row(fork._key), length)
        fork._length = length
        return fork

    def _read(self, sequence: OnnxRuntimeSequence, start: int, stop: int) -> tuple[NDArray[np.generic], ...]:
        return self._kv.read(self._pool.row(sequence._key), start, stop)

    def _restore(self, sequence: OnnxRuntimeSequence, snapshot: Snapshot) -> None:
        check_follows(snapshot, sequence.length, self._limits)
        expected = (self._spec.num_kv_heads, snapshot.length, self._spec.head_dim)
        count = 2 * self._spec.num_layers
        found = {(array.shape, array.dtype) for array in snapshot.arrays}
        if len(snapshot.arrays) != count or found != {(expected, np.dtype(np.float32))}:
            shapes = sorted(str(item) for item in found)
            raise EngineError(
                f"the snapshot has {len(snapshot.arrays)} arrays {shapes}, the model needs {count} float32 arrays of "
                f"{expected}: it was made by another model; prefill the tokens instead"
            )
        check_rope_switch(sequence.length + snapshot.length, self._limits.rope_switch, sequence._long_rope)
        self._check_room(snapshot.length)
        self._kv.write(self._pool.row(sequence._key), sequence.length, snapshot.arrays)
        sequence._length += snapshot.length

    def _close_sequence(self, sequence: OnnxRuntimeSequence) -> None:
        del self._sequences[sequence._key]
        self._kv.release(self._pool.close(sequence._key), 0, sequence._length)

    def _check_open(self) -> None:
        if self._session is None:
            raise DeviceError("the decoder is closed; open the model again")

    def check_integrity(self) -> None:
        self._pool.check_integrity()
        if len(self._pool) != len(self._sequences):
            raise AssertionError(f"{len(self._pool)} rows are taken by {len(self._sequences)} sequences")
        held = sum(sequence.length for sequence in self._sequences.values())
        if held > self._limits.kv_tokens:
            raise AssertionError(f"{held} tokens are held, more than {self._limits.kv_tokens}")

    def close(self) -> None:
        for sequence in list(self._sequences.values()):
            sequence.close()
        self._bindings.clear()
        self._session = None
        self._kv.close()


def _group(lengths: list[int], pad: bool) -> Iterator[list[int]]:
    """Indices of steps that run as one call: equal lengths, or short ones that waste little when padded.

    ``pad`` False: equal ones only. Attention of a single token has a kernel of its own, which padding avoids.
    """
    short = [i for i, n in enumerate(lengths) if n <= _PADDED_STEP]
    if short:
        widest, tokens = max(lengths[i] for i in short), sum(lengths[i] for i in short)
        if len({lengths[i] for i in short}) > 1 and (not pad or widest * len(short) > 2 * tokens):
            for n in sorted({lengths[i] for i in short}):
                yield [i for i in short if lengths[i] == n]
        else:
            yield short
    for i, n in enumerate(lengths):  # a long step fills the machine by itself
        if n > _PADDED_STEP:
            yield [i]
