"""Finished sequences, kept on the device so that a prompt which begins like one of them need not be computed again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from devices.base import DecoderSequence
from edge_runtime.errors import OutOfKVCache, OutOfSequences

RUN_AT_LEAST = 2
"""Tokens of a prompt that are run even if all of it is known: the last for its logits, and one beside it."""


@dataclass(eq=False)
class _Entry:
    tokens: NDArray[np.int64]
    sequence: DecoderSequence
    long_rope: bool


class PrefixCache:
    """Sequences by their tokens, least recently used first out. Belongs to the thread that owns the decoder.

    Entries hold places and KV cache of the decoder; they give way (:meth:`evict`) when running requests need them.
    There are never more entries than the decoder has sequences, so a search compares them one by one.
    """

    def __init__(self, max_tokens: int, min_tokens: int = 16, kv_block: int = 1) -> None:
        """``max_tokens``: allowance over all entries; 0 keeps nothing. ``min_tokens``: shorter prefixes are not worth
        a fork, which copies on some devices. ``kv_block``: see :class:`devices.base.DecoderLimits`.
        """
        self._max_tokens = max_tokens
        self._min_tokens = max(min_tokens, 1)
        self._kv_block = kv_block
        self._entries: list[_Entry] = []  # least recently used first

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def tokens(self) -> int:
        """Tokens held over all entries."""
        return sum(len(entry.tokens) for entry in self._entries)

    def match(self, tokens: Sequence[int], long_rope: bool = False) -> int:
        """How many first tokens an entry could give; see :meth:`usable`."""
        return self._find(tokens, long_rope)[1]

    def usable(self, held: NDArray[np.int64], tokens: Sequence[int]) -> int:
        """How many first ones of ``tokens`` a sequence that holds ``held`` can give; 0: too few to be worth it.

        Whole KV blocks, and never the last two tokens, so that a prompt is computed bit for bit as without the
        cache: engines multiply one token by another kernel than several, and int8 activations make a difference
        in the last bit a visible one.
        """
        common = min(common_prefix(held, np.asarray(tokens, np.int64)), len(tokens) - RUN_AT_LEAST)
        common -= common % self._kv_block
        return common if common >= self._min_tokens else 0

    def acquire(self, tokens: Sequence[int], room: bool, long_rope: bool = False) -> DecoderSequence | None:
        """A sequence that holds the longest known prefix of ``tokens``; the caller owns it. None: nothing known.

        ``room``: the decoder has a free place. Without, one is made here by evicting the oldest entry. An entry is
        forked while others may still want it; one that is a prefix of ``tokens`` as a whole, the usual next turn
        of a chat, is handed out itself, as is the last one when there is no room for a fork.
        """
        entry, length = self._find(tokens, long_rope)
        if not room:
            victim = next((other for other in self._entries if other is not entry), None)
            if victim is not None:
                self._drop(victim)
            elif entry is None or length == 0:
                raise OutOfSequences("every sequence of the decoder is in use and the prefix cache is empty")
            else:
                return self._hand_out(entry, length)
        if entry is None or length == 0:
            return None
        if len(entry.tokens) <= len(tokens) and common_prefix(entry.tokens, np.asarray(tokens)) == len(entry.tokens):
            return self._hand_out(entry, length)
        try:
            fork = entry.sequence.fork(length)
        except (OutOfSequences, OutOfKVCache):
            return self._hand_out(entry, length)
        self._entries.remove(entry)
        self._entries.append(entry)
        return fork

    def put(self, tokens: Sequence[int], sequence: DecoderSequence, long_rope: bool = False) -> None:
        """Keep ``sequence``, which holds ``tokens``; it belongs to the cache now.

        Of two entries of which one begins with the other, the longer stays.
        """
        new = _Entry(np.asarray(tokens, np.int64), sequence, long_rope)
        if len(new.tokens) != sequence.length:
            raise ValueError(f"the sequence holds {sequence.length} tokens, not the {len(new.tokens)} given")
        if not 0 < len(new.tokens) <= self._max_tokens:
            sequence.close()
            return
        for entry in [e for e in self._entries if e.long_rope == long_rope]:
            common = common_prefix(entry.tokens, new.tokens)
            if common == len(new.tokens):
                sequence.close()
                self._entries.remove(entry)
                self._entries.append(entry)
                return
            if common == len(entry.tokens):
                self._drop(entry)
        self._entries.append(new)
        while self.tokens > self._max_tokens:
            self._drop(self._entries[0])

    def evict(self) -> bool:
        """Close the least recently used entry; False if there is none."""
        if not self._entries:
            return False
        self._drop(self._entries[0])
        return True

    def clear(self) -> None:
        while self.evict():
            pass

    def check_integrity(self) -> None:
        """Raise AssertionError if the bookkeeping contradicts itself."""
        for entry in self._entries:
            assert entry.sequence.length == len(entry.tokens), "an entry's sequence has changed"
        assert self.tokens <= self._max_tokens, "more tokens kept than allowed"
        assert len({id(entry.sequence) for entry in self._entries}) == len(self._entries), "a sequence is kept twice"

    def _find(self, tokens: Sequence[int], long_rope: bool) -> tuple[_Entry | None, int]:
        """The entry with the longest common prefix; of equal ones the most recently used."""
        best: tuple[_Entry | None, int] = (None, 0)
        for entry in self._entries:
            if entry.long_rope == long_rope:
                length = self.usable(entry.tokens, tokens)
                if length >= max(best[1], 1):
                    best = (entry, length)
        return best

    def _hand_out(self, entry: _Entry, length: int) -> DecoderSequence:
        self._entries.remove(entry)
        if length < len(entry.tokens):
            entry.sequence.crop(length)
        return entry.sequence

    def _drop(self, entry: _Entry) -> None:
        self._entries.remove(entry)
        entry.sequence.close()


def common_prefix(a: NDArray[np.int64], b: NDArray[np.int64]) -> int:
    """Length of the longest common prefix of two token arrays."""
    n = min(len(a), len(b))
    different = a[:n] != b[:n]
    return int(np.argmax(different)) if different.any() else n
