"""ONNX Runtime over graphs with GroupQueryAttention: past and present are one buffer, bound once per range of rows.

The graph's inputs are described in :mod:`exporters.onnx_builder`. Every sequence has a row of the dense KV cache
(:mod:`devices.kv_rows`); a batch is a range of rows (:mod:`devices.row_pool`). ``query_seqlens`` (ONNX Runtime 1.32)
says how many tokens of each row are real, so rows of a range may be idle and short steps may be padded.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from devices.base import DecoderOptions, DecoderSpec, Step
from devices.dense_decoder import DenseDecoder, DenseSequence
from devices.errors import EngineError
from devices.kv_rows import KVRows
from devices.kv_types import choose_kv_type
from devices.onnxruntime_binding import LogitsBuffer, RowsBinding
from devices.onnxruntime_profiling import OnnxRuntimeCounters
from devices.onnxruntime_session import engine_errors, open_session
from devices.plugins import PLUGINS
from devices.row_pool import RowPool

_PADDED_STEP = 16
"""Steps up to this length (drafts being verified) may be padded to each other's length and run as one call."""


class RowKV:
    """Implements :class:`devices.dense_decoder.DenseKV` by a row of ``memory``, which ``pool`` may move."""

    def __init__(self, memory: KVRows, pool: RowPool, key: int) -> None:
        self._memory = memory
        self._pool = pool
        self.key = key
        """The row's in ``pool``."""
        self._open = True
        pool.open(key)

    @property
    def row(self) -> int:
        return self._pool.row(self.key)

    def crop(self, length: int, held: int) -> None:
        self._memory.release(self.row, length, held)

    def read(self, start: int, stop: int) -> tuple[NDArray[np.generic], ...]:
        return self._memory.read(self.row, start, stop)

    def write(self, start: int, arrays: Sequence[NDArray[np.generic]]) -> None:
        self._memory.write(self.row, start, arrays)

    def copy_of(self, other: RowKV, length: int) -> None:
        self._memory.copy(other.row, self.row, length)

    def close(self) -> None:
        if self._open:
            self._open = False
            self._memory.release(self._pool.close(self.key), 0, self._memory.capacity)


class OnnxRuntimeDecoder(DenseDecoder[RowKV]):
    """A :class:`devices.base.Decoder` on execution providers over host memory: the CPU's, and OpenVINO's plugin, which
    leaves attention to it."""

    def __init__(self, spec: DecoderSpec, options: DecoderOptions, device: str = "onnxruntime:cpu") -> None:
        """DeviceUnavailable if ``device`` cannot be used, EngineError if the model is refused."""
        choose_kv_type(device, options.kv_type, ("float32",))
        super().__init__(device, spec, options, np.float32)
        self._copied = device in PLUGINS
        self._session: Any = open_session(spec, options, device)
        if options.profile is not None:
            self.counters = OnnxRuntimeCounters(self._session, spec.model, self._stopwatch)
        # a padded step reaches past the last token that counts
        tokens = self._limits.max_context + _PADDED_STEP
        rows = options.max_sequences + options.batch_invariant
        try:
            self._kv = KVRows(rows, spec.heads_of_caches, tokens, spec.head_dim)
        except (OSError, MemoryError, ValueError) as error:
            raise EngineError(
                f"no address space for the KV cache of {options.max_sequences} sequences of "
                f"{self._limits.max_context} tokens ({error}); lower max_sequences or kv_tokens"
            ) from error
        self._pool = RowPool(options.max_sequences)
        self._batch_invariant = options.batch_invariant
        self._keys = itertools.count()
        self._logits = LogitsBuffer(spec.vocab_size)
        self._bindings: dict[tuple[int, int], RowsBinding] = {}

    def _new_kv(self) -> RowKV:
        return RowKV(self._kv, self._pool, next(self._keys))

    # ---- running

    def forward(self, batch: Sequence[Step]) -> list[NDArray[np.float32]]:
        sequences = self._check(batch)
        results: list[NDArray[np.float32] | None] = [None] * len(batch)
        for group in _group([len(step.tokens) for step in batch], pad=not self._batch_invariant):
            outputs = self._call([sequences[i] for i in group], [batch[i] for i in group])
            for i, output in zip(group, outputs, strict=True):
                results[i] = output
        return [result for result in results if result is not None]

    def _run(self, sequence: DenseSequence[RowKV], step: Step) -> NDArray[np.float32]:
        return self._call([sequence], [step])[0]

    def _call(self, sequences: list[DenseSequence[RowKV]], steps: list[Step]) -> list[NDArray[np.float32]]:
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
                place, n, held = sequence.kv.row - first, len(step.tokens), sequence.length
                bound.ids[place, :n] = step.tokens
                if self._limits.rope_switch is not None:
                    start = self._position(sequence)
                    bound.positions[place, :n] = np.arange(start, start + n)
                bound.held[place] = held + n - 1
                bound.new[place] = n
                total = max(total, held + n)
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
            sequence.grow(len(step.tokens))
            results.append(bound.logits[end : end + step.rows].copy())
            end += step.rows
        return results

    def _arrange(self, sequences: list[DenseSequence[RowKV]], idle: int) -> tuple[int, int]:
        held = {sequence.kv.key: sequence.length for sequence in self._sequences}
        window = self._pool.arrange([sequence.kv.key for sequence in sequences], held.__getitem__, idle)
        lengths = {self._pool.row(key): length for key, length in held.items()}
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

    # ---- the end

    def check_integrity(self) -> None:
        super().check_integrity()
        self._pool.check_integrity()
        if len(self._pool) != len(self._sequences):
            raise AssertionError(f"{len(self._pool)} rows are taken by {len(self._sequences)} sequences")

    def _release(self) -> None:
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
