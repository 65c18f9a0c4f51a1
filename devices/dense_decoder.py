"""What decoders do alike whose sequences each have a dense KV cache of their own: all but keeping it and computing.

The steps of a batch run one after another.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from devices.base import DecoderLimits, DecoderOptions, DecoderSpec, Snapshot, Step
from devices.bound_sequence import BoundSequence
from devices.errors import EngineError, OutOfKVCache
from devices.sequence_decoder import SequenceDecoder
from devices.steps import check_batch, check_follows, check_rope_switch, snapshot_stop


class DenseKV(Protocol):
    """Keys and values of one sequence, layer by layer. How many tokens count is known by who uses it.

    What cannot be done is an EngineError.
    """

    def crop(self, length: int, held: int) -> None:
        """Only the first ``length`` of ``held`` tokens count from now on."""

    def read(self, start: int, stop: int) -> tuple[NDArray[np.generic], ...]:
        """Copies of tokens ``start`` to ``stop``, (kv_heads, stop − start, head_dim) each."""

    def write(self, start: int, arrays: Sequence[NDArray[np.generic]]) -> None:
        """What :meth:`read` gave, of one token or more, behind the first ``start`` tokens."""

    def copy_of(self, other: Self, length: int) -> None:
        """The first ``length`` tokens of ``other``, at least one; there were none here."""

    def close(self) -> None:
        """Give the memory back. Idempotent, and no error."""


K = TypeVar("K", bound=DenseKV)


class DenseSequence(BoundSequence["DenseDecoder[K]"], Generic[K]):
    """See :class:`devices.base.DecoderSequence`."""

    def __init__(self, decoder: DenseDecoder[K], kv: K, on_long: bool) -> None:
        super().__init__(decoder)
        self.kv = kv
        self._length = 0
        self.on_long = on_long
        """On the long rotary factors (longrope)."""

    @property
    def length(self) -> int:
        return self._length if self.decoder else 0

    def grow(self, count: int) -> None:
        """Note that the cache holds ``count`` more tokens."""
        self._length += count

    def crop(self, length: int) -> int:
        self._check_length(length)
        if length < self._length:
            self.kv.crop(length, self._length)
        self._length = length
        return length

    def fork(self, length: int) -> DenseSequence[K]:
        self._check_length(length)
        return self.decoder.fork(self, length)

    def snapshot(self, start: int = 0, stop: int | None = None) -> Snapshot:
        stop = snapshot_stop(start, stop, self.length)
        return Snapshot(stop - start, self.decoder.read(self, start, stop), start)

    def restore(self, snapshot: Snapshot) -> None:
        self.decoder.restore(self, snapshot)


class DenseDecoder(SequenceDecoder[DenseSequence[K]]):
    """The frame of a :class:`devices.base.Decoder`; ``kv_tokens`` bounds the sum of its sequences."""

    def __init__(
        self,
        device: str,
        spec: DecoderSpec,
        options: DecoderOptions,
        dtype: Any,
        *,
        max_context: int | None = None,
        long_offset: int | None = None,
    ) -> None:
        """``dtype``: numpy's, of the cache. ``max_context``: tokens that a sequence can hold, unless the model's own
        context and ``options.kv_tokens`` are less. ``long_offset``: what is added to the positions of sequences on the
        long rotary factors; None: the model's context.
        """
        if options.kv_tokens is not None and options.kv_tokens < 1:
            raise ValueError(f"kv_tokens must be at least 1, not {options.kv_tokens}")
        most = spec.max_context if max_context is None else min(spec.max_context, max_context)
        kv_tokens = most if options.kv_tokens is None else options.kv_tokens
        context = min(most, kv_tokens)
        limits = DecoderLimits(
            max_context=context,
            max_prompt=context,
            max_sequences=options.max_sequences,
            prefill_chunk=options.prefill_chunk,
            kv_tokens=kv_tokens,
            kv_bytes_per_token=sum(spec.heads_of_caches) * spec.head_dim * np.dtype(dtype).itemsize,
            rope_switch=spec.rope_switch,
        )
        super().__init__(device, limits)
        self._spec = spec
        self._dtype = np.dtype(dtype)
        self._long_offset = spec.max_context if long_offset is None else long_offset

    @abstractmethod
    def _new_kv(self) -> K:
        """Of a new sequence."""

    @abstractmethod
    def _run(self, sequence: DenseSequence[K], step: Step) -> NDArray[np.float32]:
        """(rows, vocab): the logits of ``step``, whose tokens are in the cache and counted then."""

    # ---- sequences

    def new_sequence(self, expected: int = 0) -> DenseSequence[K]:
        return self._register(self._starts_on_long(expected))

    def _register(self, on_long: bool) -> DenseSequence[K]:
        self._check_place()
        sequence = DenseSequence(self, self._new_kv(), on_long)
        self._sequences.add(sequence)
        return sequence

    def fork(self, source: DenseSequence[K], length: int) -> DenseSequence[K]:
        """See :class:`devices.base.DecoderSequence`."""
        self._check_place()
        self._check_room(length)
        child = self._register(source.on_long)
        if length == 0:
            return child
        try:
            child.kv.copy_of(source.kv, length)
        except EngineError:
            child.close()
            raise
        child.grow(length)
        return child

    def read(self, sequence: DenseSequence[K], start: int, stop: int) -> tuple[NDArray[np.generic], ...]:
        """Copies of tokens ``start`` to ``stop``."""
        if start == stop:
            return tuple(np.empty(shape, self._dtype) for shape in self._shapes(0))
        return sequence.kv.read(start, stop)

    def _shapes(self, tokens: int) -> list[tuple[int, int, int]]:
        return [(heads, tokens, self._spec.head_dim) for heads in self._spec.heads_of_caches]

    def restore(self, sequence: DenseSequence[K], snapshot: Snapshot) -> None:
        """See :class:`devices.base.DecoderSequence`."""
        length, form = sequence.length, [(shape, self._dtype) for shape in self._shapes(snapshot.length)]
        check_follows(snapshot, length, self._limits)
        if [(array.shape, array.dtype) for array in snapshot.arrays] != form:
            raise EngineError("the snapshot was taken from another model or device; prefill the tokens instead")
        check_rope_switch(length + snapshot.length, self._limits.rope_switch, sequence.on_long)
        self._check_room(snapshot.length)
        if snapshot.length:
            sequence.kv.write(length, snapshot.arrays)
            sequence.grow(snapshot.length)

    def forget(self, sequence: DenseSequence[K]) -> None:
        """A sequence is closing."""
        self._sequences.discard(sequence)
        sequence.kv.close()

    def _check_room(self, tokens: int) -> None:
        held = sum(sequence.length for sequence in self._sequences)
        if held + tokens > self._limits.kv_tokens:
            raise OutOfKVCache(
                f"{tokens} more tokens do not fit: {held} of {self._limits.kv_tokens} are held; close or crop "
                "sequences, or open the device with more kv_tokens"
            )

    # ---- running

    def forward(self, batch: Sequence[Step]) -> list[NDArray[np.float32]]:
        sequences = self._check(batch)
        return [self._run(sequence, step) for sequence, step in zip(sequences, batch, strict=True)]

    def _check(self, batch: Sequence[Step]) -> list[DenseSequence[K]]:
        """The sequences of ``batch``, after everything that can refuse it."""
        self.check_open()
        sequences = [self._own(step) for step in batch]
        check_batch(batch, self._limits, self._spec.vocab_size)
        for sequence, step in zip(sequences, batch, strict=True):
            check_rope_switch(sequence.length + step.tokens.size, self._limits.rope_switch, sequence.on_long)
        self._check_room(sum(step.tokens.size for step in batch))
        return sequences

    def _position(self, sequence: DenseSequence[K]) -> int:
        """Of the next token, in the rotary tables."""
        return sequence.length + (self._long_offset if sequence.on_long else 0)

    # ---- the end

    def check_integrity(self) -> None:
        held = sum(sequence.length for sequence in self._sequences)
        if held > self._limits.kv_tokens or len(self._sequences) > self._limits.max_sequences:
            raise AssertionError(f"{len(self._sequences)} sequences hold {held} tokens, of at most {self._limits}")

    def close(self) -> None:
        for sequence in self._sequences:
            sequence.kv.close()
        super().close()
