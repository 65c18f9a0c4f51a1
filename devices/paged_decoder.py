"""What decoders over pools of KV blocks do alike: all but holding the blocks and computing.

Forking and cropping are block-table work (:mod:`devices.block_pool`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from devices.base import DecoderLimits, DecoderOptions, DecoderSpec, KVChoice, Snapshot, Step
from devices.block_pool import BlockTable
from devices.errors import EngineError, OutOfKVCache
from devices.kv_pool import KVPool
from devices.kv_types import KVType
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
    """A decoder whose sequences are tables of blocks, each in one of its pools."""

    def __init__(
        self,
        device: str,
        spec: DecoderSpec,
        options: DecoderOptions,
        pools: Sequence[KVPool],
        *,
        kv_tokens: int,
        long_offset: int,
        kv_block: int = 1,
        invariant: bool = False,
    ) -> None:
        """``pools``: the default first; of several each has a type of its own, and room for all that ``kv_tokens`` of
        the first take. ``kv_tokens``, ``kv_block``, ``invariant``: see :class:`DecoderLimits`. ``long_offset``: what is
        added to the positions of sequences on the long rotary factors.
        """
        choices = [KVChoice(pool.kv_type, pool.bytes_per_token) for pool in pools if pool.kv_type is not None]
        limits = DecoderLimits(
            max_context=spec.max_context,
            max_prompt=spec.max_context,
            max_sequences=options.max_sequences,
            prefill_chunk=options.prefill_chunk,
            kv_tokens=kv_tokens,
            kv_bytes_per_token=pools[0].bytes_per_token,
            kv_block=kv_block,
            rope_switch=spec.rope_switch,
            kv_choices=tuple(choices) if len(pools) > 1 else (),
            invariant=invariant,
        )
        super().__init__(device, limits)
        self.pools = tuple(pools)
        self._vocab_size = spec.vocab_size
        self._long_offset = long_offset

    # ---- sequences

    def new_sequence(self, expected: int = 0) -> PagedSequence:
        return self._register(self.pools[0], BlockTable(), self._starts_on_long(expected))

    def new_sequence_in(self, kv_type: KVType, expected: int = 0) -> PagedSequence:
        """See :class:`devices.base.KVChoosing`."""
        for pool in self.pools:
            if pool.kv_type == kv_type:
                return self._register(pool, BlockTable(), self._starts_on_long(expected))
        raise ValueError(f"{self._device} has no KV cache of {kv_type} open")

    def fork(self, sequence: PagedSequence, length: int) -> PagedSequence:
        self._check_place()
        pool = sequence.pool
        return self._register(pool, pool.blocks.fork(sequence.table, length), sequence.on_long)

    def _register(self, pool: KVPool, table: BlockTable, on_long: bool) -> PagedSequence:
        self._check_place()
        sequence = PagedSequence(self, pool, table, on_long)
        self._sequences.add(sequence)
        return sequence

    def _check_room(self, growth: Sequence[tuple[KVPool, int]]) -> None:
        """OutOfKVCache unless ``kv_tokens`` allows so many more; what sequences share counts once, which is looked at
        only where it matters."""
        limit = self._limits.kv_bytes
        new = sum(count * pool.bytes_per_token for pool, count in growth)
        if sum(each.length * each.pool.bytes_per_token for each in self._sequences) + new <= limit:
            return
        filled: dict[tuple[KVPool, int], int] = {}
        for sequence in self._sequences:
            size = sequence.pool.blocks.block_size
            for index, block in enumerate(sequence.table.blocks):
                here = min(size, sequence.length - index * size)
                filled[sequence.pool, block] = max(filled.get((sequence.pool, block), 0), here)
        held = sum(tokens * pool.bytes_per_token for (pool, _), tokens in filled.items())
        if held + new > limit:
            tokens = sum(count for _, count in growth)
            raise OutOfKVCache(
                f"{tokens} more tokens do not fit the KV cache of {self._limits.kv_tokens}, {sum(filled.values())} are "
                "held; close or crop a sequence"
            )

    def forget(self, sequence: PagedSequence, table: BlockTable) -> None:
        self._sequences.discard(sequence)
        sequence.pool.blocks.crop(table, 0)

    def restore(self, sequence: PagedSequence, snapshot: Snapshot) -> None:
        table, pool = sequence.table, sequence.pool
        check_follows(snapshot, table.length, self._limits)
        if [(array.shape, array.dtype) for array in snapshot.arrays] != pool.storage.form(snapshot.length):
            raise EngineError(
                "the snapshot was taken from another model or device, or with another KV precision; prefill the "
                "tokens instead"
            )
        check_rope_switch(table.length + snapshot.length, self._limits.rope_switch, sequence.on_long)
        self._check_room([(pool, snapshot.length)])
        first = table.length // pool.blocks.block_size
        pool.blocks.append([(table, snapshot.length)])
        pool.storage.write(table.blocks[first:], snapshot.arrays)

    # ---- running

    def forward(self, batch: Sequence[Step]) -> list[NDArray[np.float32]]:
        self.check_open()
        check_batch(batch, self._limits, self._vocab_size)
        sequences = [self._own(step) for step in batch]
        counts = [step.tokens.size for step in batch]
        for sequence, count in zip(sequences, counts, strict=True):
            check_rope_switch(sequence.length + count, self._limits.rope_switch, sequence.on_long)
        self._check_room([(sequence.pool, count) for sequence, count in zip(sequences, counts, strict=True)])
        if len(self.pools) == 1:
            return self._run(self.pools[0], batch, sequences)
        results: list[NDArray[np.float32]] = [NO_ROWS] * len(batch)
        for pool in self.pools:
            mine = [place for place, sequence in enumerate(sequences) if sequence.pool is pool]
            if mine:
                rows = self._run(pool, [batch[place] for place in mine], [sequences[place] for place in mine])
                for place, logits in zip(mine, rows, strict=True):
                    results[place] = logits
        return results

    def _run(
        self, pool: KVPool, batch: Sequence[Step], sequences: Sequence[PagedSequence]
    ) -> list[NDArray[np.float32]]:
        """Steps of sequences of one pool."""
        past = [sequence.length for sequence in sequences]
        growth = [(sequence.table, step.tokens.size) for sequence, step in zip(sequences, batch, strict=True)]
        for copy in pool.blocks.append(growth):
            pool.storage.copy(copy.source, copy.target)
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
        return self._compute(parts, pool)

    @abstractmethod
    def _compute(self, parts: list[Part], pool: KVPool) -> list[NDArray[np.float32]]:
        """Append the tokens to their blocks; logits (rows, vocab_size) for each part, the caller's own. EngineError."""

    # ---- the end

    def trim(self) -> None:
        """See :class:`devices.base.Trimming`."""
        for pool in self.pools:
            for run in pool.blocks.take_idle():
                pool.storage.release(run)

    def check_integrity(self) -> None:
        for pool in self.pools:
            pool.blocks.check_integrity([each.table for each in self._sequences if each.pool is pool])
        if len(self._sequences) > self._limits.max_sequences:
            raise AssertionError(f"{len(self._sequences)} sequences are open, of {self._limits.max_sequences}")


NO_ROWS = np.empty((0, 0), np.float32)


def tokens_to_hold(spec: DecoderSpec, options: DecoderOptions) -> int:
    """``options.kv_tokens``, one full context if it is None. ValueError below 1."""
    tokens = spec.max_context if options.kv_tokens is None else options.kv_tokens
    if tokens < 1:
        raise ValueError(f"kv_tokens must be at least 1, not {tokens}")
    return tokens


def blocks_to_hold(tokens: int, sequences: int, block_size: int) -> int:
    """For ``tokens`` tokens of ``sequences`` sequences, each of which may leave its last block partly empty."""
    return -(-tokens // block_size) + sequences
