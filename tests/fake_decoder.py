"""A decoder without a model: the contract of devices/base.py in a page, for tests and as an example for devices.

It keeps *token ids* where a real device keeps keys and values, in blocks of a shared pool: ``fork`` shares blocks,
appending to a shared block copies it first, ``crop`` gives blocks back. Its logits are a pure function of the
tokens read back through the block table, so that any mistake in the bookkeeping changes the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from devices.base import DecoderLimits, Snapshot, Step
from devices.errors import DeviceError, EngineError, OutOfKVCache, OutOfSequences
from devices.steps import check_batch, check_follows, check_rope_switch, snapshot_stop

BLOCK = 4
"""Tokens per block."""
_STATES = 4093


class FakeSequence:
    """Tokens through a table of blocks."""

    def __init__(self, decoder: FakeDecoder, long_rope: bool) -> None:
        self.decoder = decoder
        self.long_rope = long_rope
        self.blocks: list[int] = []
        self._length = 0
        self.closed = False

    @property
    def length(self) -> int:
        self._require_open()
        return self._length

    @property
    def nbytes(self) -> int:
        self._require_open()
        return len(self.blocks) * BLOCK * self.decoder.limits.kv_bytes_per_token

    def crop(self, length: int) -> int:
        self._require_open()
        self._require_within(length)
        length -= length % self.decoder.crop_step if length < self._length else 0
        keep = -(-length // BLOCK)
        self.decoder.give_back(self.blocks[keep:])
        del self.blocks[keep:]
        self._length = length
        return length

    def fork(self, length: int) -> FakeSequence:
        self._require_open()
        self._require_within(length)
        twin = self.decoder.open_sequence(self.long_rope)
        twin.blocks = self.blocks[: -(-length // BLOCK)]
        self.decoder.share(twin.blocks)
        twin._length = length
        return twin

    def snapshot(self, start: int = 0, stop: int | None = None) -> Snapshot | None:
        self._require_open()
        stop = snapshot_stop(start, stop, self._length)
        return Snapshot(stop - start, (self.tokens()[start:stop],), start)

    def restore(self, snapshot: Snapshot) -> None:
        self._require_open()
        check_follows(snapshot, self._length, self.decoder.limits)
        check_rope_switch(self._length + snapshot.length, self.decoder.limits.rope_switch, self.long_rope)
        if len(snapshot.arrays) != 1 or snapshot.arrays[0].shape != (snapshot.length,):
            raise EngineError(f"the snapshot of {len(snapshot.arrays)} arrays is not of this model")
        self.decoder.require_blocks(self.new_blocks(snapshot.length))
        self.append(snapshot.arrays[0].astype(np.int64))

    def close(self) -> None:
        if not self.closed:
            self.decoder.give_back(self.blocks)
            self.decoder.sequences.remove(self)
            self.closed = True

    def tokens(self) -> NDArray[np.int64]:
        """All tokens held, read through the block table."""
        return self.decoder.pool[self.blocks].reshape(-1)[: self._length].copy()

    def new_blocks(self, count: int) -> int:
        """Blocks needed to append ``count`` tokens, the copy of a shared one included."""
        more = -(-(self._length + count) // BLOCK) - len(self.blocks)
        return more + self._must_copy()

    def append(self, tokens: NDArray[np.int64]) -> None:
        if self._must_copy():
            (copy,) = self.decoder.allocate(1)
            self.decoder.pool[copy] = self.decoder.pool[self.blocks[-1]]
            self.decoder.give_back(self.blocks[-1:])
            self.blocks[-1] = copy
        self.blocks += self.decoder.allocate(-(-(self._length + len(tokens)) // BLOCK) - len(self.blocks))
        for token in tokens:
            self.decoder.pool[self.blocks[self._length // BLOCK], self._length % BLOCK] = token
            self._length += 1

    def _must_copy(self) -> bool:
        return self._length % BLOCK != 0 and self.decoder.references[self.blocks[-1]] > 1

    def _require_open(self) -> None:
        if self.closed or self.decoder.closed:
            raise DeviceError("this sequence is closed; open a new one")

    def _require_within(self, length: int) -> None:
        if not 0 <= length <= self._length:
            raise ValueError(f"length must be between 0 and {self._length}, not {length}")


class FakeDecoder:
    """Deterministic logits from token histories, with limits and failures to order."""

    device = "fake:cpu"
    engine_seconds = 0.0

    def __init__(
        self,
        *,
        vocab_size: int = 64,
        max_context: int = 256,
        max_prompt: int | None = None,
        max_sequences: int = 8,
        prefill_chunk: int = 16,
        kv_tokens: int = 1024,
        rope_switch: int | None = None,
        crop_step: int = 1,
        before_forward: Callable[[Sequence[Step]], None] = lambda batch: None,
    ) -> None:
        """``crop_step``: crops are granted in multiples of it. ``before_forward`` may raise, to inject a failure."""
        self.limits = DecoderLimits(
            max_context=max_context,
            max_prompt=max_prompt or max_context,
            max_sequences=max_sequences,
            prefill_chunk=prefill_chunk,
            kv_tokens=kv_tokens,
            kv_bytes_per_token=8,
            rope_switch=rope_switch,
        )
        self.vocab_size = vocab_size
        self.crop_step = crop_step
        self.before_forward = before_forward
        self.table = np.random.default_rng(0).standard_normal((_STATES, vocab_size)).astype(np.float32)
        self.pool = np.full((kv_tokens // BLOCK, BLOCK), -1, np.int64)
        self.references = [0] * len(self.pool)
        self.sequences: list[FakeSequence] = []
        self.closed = False
        self.batches: list[list[tuple[int, int]]] = []
        """(tokens, rows) of each step of each forward that ran."""

    def new_sequence(self, expected: int = 0) -> FakeSequence:
        return self.open_sequence(self.limits.rope_switch is not None and expected > self.limits.rope_switch)

    def open_sequence(self, long_rope: bool) -> FakeSequence:
        if self.closed:
            raise DeviceError("this decoder is closed")
        if len(self.sequences) >= self.limits.max_sequences:
            raise OutOfSequences(f"{len(self.sequences)} sequences are open, the limit; close one first")
        self.sequences.append(FakeSequence(self, long_rope))
        return self.sequences[-1]

    def forward(self, batch: Sequence[Step]) -> list[NDArray[np.float32]]:
        self._check(batch)
        self.before_forward(batch)
        results = []
        for sequence, tokens, rows in batch:
            assert isinstance(sequence, FakeSequence)
            sequence.append(tokens)
            results.append(self._logits(sequence)[sequence.length - rows :].copy())
        self.batches.append([(len(step.tokens), step.rows) for step in batch])
        return results

    def _check(self, batch: Sequence[Step]) -> None:
        """Everything that can be refused, before anything is changed."""
        if self.closed:
            raise DeviceError("this decoder is closed")
        check_batch(batch, self.limits, self.vocab_size)
        sequences = [step.sequence for step in batch]
        if not all(isinstance(sequence, FakeSequence) and sequence.decoder is self for sequence in sequences):
            raise ValueError("a sequence of the batch belongs to another decoder")
        blocks = 0
        for sequence, tokens, _ in batch:
            assert isinstance(sequence, FakeSequence)
            check_rope_switch(sequence.length + len(tokens), self.limits.rope_switch, sequence.long_rope)
            blocks += sequence.new_blocks(len(tokens))
        self.require_blocks(blocks)

    def _logits(self, sequence: FakeSequence) -> NDArray[np.float32]:
        """(length, vocab) of all tokens: a row of the table picked by a rolling hash of the history."""
        state = 7 if sequence.long_rope else 1
        states = [state := (state * 131 + int(token) + 1) % _STATES for token in sequence.tokens()]
        return self.table[states]

    def require_blocks(self, count: int) -> None:
        free = self.references.count(0)
        if count > free:
            raise OutOfKVCache(f"{count} blocks of KV cache are needed, {free} are free")

    def allocate(self, count: int) -> list[int]:
        self.require_blocks(count)
        taken = [block for block, users in enumerate(self.references) if users == 0][:count]
        self.share(taken)
        return taken

    def share(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self.references[block] += 1

    def give_back(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self.references[block] -= 1
            if self.references[block] == 0:
                self.pool[block] = -1  # a stale reader would notice

    def check_integrity(self) -> None:
        users = [0] * len(self.pool)
        for sequence in self.sequences:
            assert len(sequence.blocks) == -(-sequence.length // BLOCK), "a block table is too long or too short"
            for block in sequence.blocks:
                users[block] += 1
        assert users == self.references, "reference counts disagree with the block tables"

    def close(self) -> None:
        for sequence in list(self.sequences):
            sequence.close()
        self.closed = True
