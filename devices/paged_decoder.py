"""What decoders over a pool of KV blocks do alike: all but holding the blocks and computing.

Forking and cropping are block-table work (:mod:`devices.block_pool`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from devices.base import DecoderLimits, DecoderOptions, DecoderSpec, Snapshot, Step
from devices.block_pool import BlockPool, BlockTable
from devices.errors import EngineError, OutOfKVCache
from devices.paged_sequence import PagedSequence
from devices.sequence_decoder import SequenceDecoder
from devices.steps import check_batch, check_follows, check_rope_switch


class Part(NamedTuple):
    """A sequence's part in an inference."""

    tokens: NDArray[np.int64]
    past: int
    """Tokens held before."""
    position: int
    """Of the first token, in the rotary tables."""
    blocks: list[int]
    """The sequence's own list, with room for ``tokens``."""
    rows: int
    """Logits are wanted of so many of its last tokens."""

    @property
    def length(self) -> int:
        return self.past + len(self.tokens)


class PagedDecoder(SequenceDecoder[PagedSequence]):
    """A decoder whose sequences are tables of blocks."""

    def __init__(
        self,
        device: str,
        spec: DecoderSpec,
        options: DecoderOptions,
        pool: BlockPool,
        *,
        kv_tokens: int,
        block_bytes: int,
        long_offset: int,
        kv_block: int = 1,
        invariant: bool = False,
    ) -> None:
        """``kv_tokens``, ``kv_block``, ``invariant``: see :class:`DecoderLimits`. ``block_bytes``: of a block over all
        layers. ``long_offset``: what is added to the positions of sequences on the long rotary factors.
        """
        limits = DecoderLimits(
            max_context=spec.max_context,
            max_prompt=spec.max_context,
            max_sequences=options.max_sequences,
            prefill_chunk=options.prefill_chunk,
            kv_tokens=kv_tokens,
            kv_bytes_per_token=-(-block_bytes // pool.block_size),
            kv_block=kv_block,
            rope_switch=spec.rope_switch,
            invariant=invariant,
        )
        super().__init__(device, limits)
        self.pool = pool
        self.block_bytes = block_bytes
        self._vocab_size = spec.vocab_size
        self._long_offset = long_offset

    # ---- sequences

    def new_sequence(self, expected: int = 0) -> PagedSequence:
        return self._register(BlockTable(), self._starts_on_long(expected))

    def fork(self, sequence: PagedSequence, length: int) -> PagedSequence:
        self._check_place()
        return self._register(self.pool.fork(sequence.table, length), sequence.on_long)

    def _register(self, table: BlockTable, on_long: bool) -> PagedSequence:
        self._check_place()
        sequence = PagedSequence(self, table, on_long)
        self._sequences.add(sequence)
        return sequence

    def _check_room(self, tokens: int) -> None:
        """OutOfKVCache unless ``kv_tokens`` allows so many more; what sequences share counts once, which is looked at
        only where it matters."""
        limit = self._limits.kv_tokens
        if sum(sequence.length for sequence in self._sequences) + tokens <= limit:
            return
        filled: dict[int, int] = {}
        for sequence in self._sequences:
            for index, block in enumerate(sequence.table.blocks):
                here = min(self.pool.block_size, sequence.length - index * self.pool.block_size)
                filled[block] = max(filled.get(block, 0), here)
        held = sum(filled.values())
        if held + tokens > limit:
            raise OutOfKVCache(
                f"{tokens} more tokens do not fit the KV cache of {limit}, {held} are held; close or crop a sequence"
            )

    def forget(self, sequence: PagedSequence, table: BlockTable) -> None:
        self._sequences.discard(sequence)
        self.pool.crop(table, 0)

    def restore(self, sequence: PagedSequence, snapshot: Snapshot) -> None:
        table = sequence.table
        check_follows(snapshot, table.length, self._limits)
        if [(array.shape, array.dtype) for array in snapshot.arrays] != self._snapshot_form(snapshot.length):
            raise EngineError(
                "the snapshot was taken from another model or device, or with another KV precision; prefill the "
                "tokens instead"
            )
        check_rope_switch(table.length + snapshot.length, self._limits.rope_switch, sequence.on_long)
        self._check_room(snapshot.length)
        first = table.length // self.pool.block_size
        self.pool.append([(table, snapshot.length)])
        self._write(table.blocks[first:], snapshot.arrays)

    # ---- running

    def forward(self, batch: Sequence[Step]) -> list[NDArray[np.float32]]:
        self.check_open()
        check_batch(batch, self._limits, self._vocab_size)
        sequences = [self._own(step) for step in batch]
        counts = [step.tokens.size for step in batch]
        for sequence, count in zip(sequences, counts, strict=True):
            check_rope_switch(sequence.length + count, self._limits.rope_switch, sequence.on_long)
        self._check_room(sum(counts))

        past = [sequence.length for sequence in sequences]
        for copy in self.pool.append([(s.table, count) for s, count in zip(sequences, counts, strict=True)]):
            self._copy_block(copy.source, copy.target)
        parts = [
            Part(
                step.tokens,
                length,
                length + (self._long_offset if sequence.on_long else 0),
                sequence.table.blocks,
                step.rows,
            )
            for step, sequence, length in zip(batch, sequences, past, strict=True)
        ]
        return self._compute(parts)

    # ---- what the device does

    @abstractmethod
    def read(self, blocks: list[int], tokens: int) -> tuple[NDArray[np.generic], ...]:
        """See :class:`devices.paged_sequence.PagedHost`."""

    @abstractmethod
    def _snapshot_form(self, tokens: int) -> list[tuple[tuple[int, ...], np.dtype[Any]]]:
        """Shape and type of each array that :meth:`read` gives of ``tokens`` tokens."""

    @abstractmethod
    def _write(self, blocks: list[int], arrays: tuple[NDArray[np.generic], ...]) -> None:
        """What :meth:`read` gave, into other blocks."""

    @abstractmethod
    def _copy_block(self, source: int, target: int) -> None:
        """In every layer, before the next inference."""

    @abstractmethod
    def _compute(self, parts: list[Part]) -> list[NDArray[np.float32]]:
        """Append the tokens to their blocks; logits (rows, vocab_size) for each part, the caller's own. EngineError."""

    # ---- the end

    def check_integrity(self) -> None:
        self.pool.check_integrity([sequence.table for sequence in self._sequences])
        if len(self._sequences) > self._limits.max_sequences:
            raise AssertionError(f"{len(self._sequences)} sequences are open, of {self._limits.max_sequences}")


def tokens_to_hold(spec: DecoderSpec, options: DecoderOptions) -> int:
    """``options.kv_tokens``, one full context if it is None. ValueError below 1."""
    tokens = spec.max_context if options.kv_tokens is None else options.kv_tokens
    if tokens < 1:
        raise ValueError(f"kv_tokens must be at least 1, not {tokens}")
    return tokens


def blocks_to_hold(tokens: int, sequences: int, block_size: int) -> int:
    """For ``tokens`` tokens of ``sequences`` sequences, each of which may leave its last block partly empty."""
    return -(-tokens // block_size) + sequences
