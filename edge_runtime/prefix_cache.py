"""Finished sequences, kept on the device so that a prompt which begins like one of them need not be computed again.

What has been used a second time goes to the disk as well (:mod:`edge_runtime.prefix_store`) when the engine is idle,
and at the end whatever is long.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from devices.base import DecoderSequence
from edge_runtime.errors import ContextOverflow, DeviceError, OutOfKVCache, OutOfSequences
from edge_runtime.prefix_store import SEGMENT, PrefixStore
from edge_runtime.request import PLAIN, Kind

RUN_AT_LEAST = 2
"""Tokens of a prompt that are run even if all of it is known: the last for its logits, and one beside it."""
EXTEND_FROM = 128
"""So many more tokens must be in the store than on the device to be fetched from there."""
SAVE_AT_END_FROM = 512
"""Entries of so many tokens are stored at the end even if nobody has used them twice."""
SAVE_AT_END_S = 2.0
"""But no longer than this."""


@dataclass(eq=False)
class _Entry:
    tokens: NDArray[np.int64]
    sequence: DecoderSequence
    kind: Kind
    wanted: int = 0
    """Tokens that more than one request has used: worth storing."""
    stored: int = 0
    """Segments that are in the store."""

    @property
    def unsaved(self) -> bool:
        return self.stored < self.wanted // SEGMENT


class PrefixCache:
    """Sequences by their tokens, least recently used first out. Belongs to the thread that owns the decoder.

    Entries hold places and KV cache of the decoder; they give way (:meth:`evict`) when running requests need them.
    There are never more entries than the decoder has sequences, so a search compares them one by one.
    """

    def __init__(
        self, max_bytes: int, min_tokens: int = 16, kv_block: int = 1, store: PrefixStore | None = None
    ) -> None:
        """``max_bytes``: allowance over all entries, in which what they share counts in each; 0 keeps nothing.
        ``min_tokens``: shorter prefixes are not worth a fork, which copies on some devices. ``kv_block``: see
        :class:`devices.base.DecoderLimits`. ``store`` belongs to the cache from now on.
        """
        self._max_bytes = self._most_bytes = max_bytes
        self._min_tokens = max(min_tokens, 1)
        self._kv_block = kv_block
        self._store = store
        self._entries: list[_Entry] = []  # least recently used first

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def tokens(self) -> int:
        """Tokens held over all entries."""
        return sum(len(entry.tokens) for entry in self._entries)

    @property
    def nbytes(self) -> int:
        """KV cache held over all entries, in bytes."""
        return sum(entry.sequence.nbytes for entry in self._entries)

    def match(self, tokens: Sequence[int], kind: Kind = PLAIN) -> int:
        """How many first tokens an entry could give; see :meth:`usable`."""
        return self._find(tokens, kind)[1]

    def glance(self, tokens: Sequence[int]) -> int:
        """As :meth:`match`, of whatever kind; from any thread, and so perhaps of what is gone at that moment."""
        ids = np.asarray(tokens, np.int64)
        return max((self._usable(entry.tokens, ids) for entry in list(self._entries)), default=0)

    def usable(self, held: NDArray[np.int64], tokens: Sequence[int]) -> int:
        """How many first ones of ``tokens`` a sequence that holds ``held`` can give; 0: too few to be worth it.

        Whole KV blocks, and never the last two tokens, so that a prompt is computed bit for bit as without the
        cache: engines multiply one token by another kernel than several, and int8 activations make a difference
        in the last bit a visible one.
        """
        return self._usable(held, np.asarray(tokens, np.int64))

    def _usable(self, held: NDArray[np.int64], tokens: NDArray[np.int64]) -> int:
        common = min(common_prefix(held, tokens), len(tokens) - RUN_AT_LEAST)
        common -= common % self._kv_block
        return common if common >= self._min_tokens else 0

    def acquire(self, tokens: Sequence[int], room: bool, kind: Kind = PLAIN) -> DecoderSequence | None:
        """A sequence that holds the longest known prefix of ``tokens``; the caller owns it. None: nothing known.

        ``room``: the decoder has a free place. Without, one is made here by evicting the oldest entry. An entry is
        forked while others may still want it; one that is a prefix of ``tokens`` as a whole, the usual next turn
        of a chat, is handed out itself, as is the last one when there is no room for a fork.
        """
        entry, length = self._find(tokens, kind)
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
        except DeviceError:
            return self._hand_out(entry, length)
        entry.wanted = max(entry.wanted, length)
        self._entries.remove(entry)
        self._entries.append(entry)
        return fork

    def extend(self, sequence: DecoderSequence, tokens: Sequence[int], kind: Kind = PLAIN) -> None:
        """Let ``sequence``, which holds some first ones of ``tokens`` or none, have what more of them is in the store.

        Reads a segment of 256 tokens in about the time of one token's decoding.
        """
        if self._store is None:
            return
        names = list(self._store.names(tokens[:-RUN_AT_LEAST], kind))
        known = next((place for place, name in enumerate(names) if not self._store.touch(place, name)), len(names))
        if known * SEGMENT - sequence.length < EXTEND_FROM:
            return
        whole = sequence.length // SEGMENT
        if sequence.crop(whole * SEGMENT) != whole * SEGMENT:
            return
        for name in names[whole:known]:
            snapshot = self._store.load(name)
            if snapshot is None:
                return
            try:
                sequence.restore(snapshot)
            except (OutOfKVCache, ContextOverflow):
                return
            except DeviceError:
                self._store.discard(name)
                return

    def put(self, tokens: Sequence[int], sequence: DecoderSequence, kind: Kind = PLAIN, *, wanted: int = 0) -> None:
        """Keep ``sequence``, which holds ``tokens``; it belongs to the cache now. The first ``wanted`` of them came
        from here.

        Of two entries of which one begins with the other, the longer stays.
        """
        new = _Entry(np.asarray(tokens, np.int64), sequence, kind, wanted)
        if len(new.tokens) != sequence.length:
            raise ValueError(f"the sequence holds {sequence.length} tokens, not the {len(new.tokens)} given")
        if len(new.tokens) == 0 or sequence.nbytes > self._max_bytes:
            sequence.close()
            return
        for entry in [e for e in self._entries if e.kind == kind]:
            common = common_prefix(entry.tokens, new.tokens)
            if common == len(new.tokens):
                sequence.close()
                entry.wanted = max(entry.wanted, wanted)
                self._entries.remove(entry)
                self._entries.append(entry)
                return
            if common == len(entry.tokens):
                new.wanted = max(new.wanted, entry.wanted)
                self._drop(entry)
        self._entries.append(new)
        while self.nbytes > self._max_bytes:
            self._drop(self._entries[0])

    def evict(self) -> bool:
        """Close the least recently used entry; False if there is none."""
        if not self._entries:
            return False
        self._drop(self._entries[0])
        return True

    def limit(self, nbytes: int | None) -> None:
        """Hold no more than that, for now; None: what it may."""
        self._max_bytes = self._most_bytes if nbytes is None else min(self._most_bytes, nbytes)
        while self.nbytes > self._max_bytes:
            self._drop(self._entries[0])

    @property
    def unsaved(self) -> bool:
        """:meth:`save_next` has something to do."""
        store = self._store
        return store is not None and store.writable and any(entry.unsaved for entry in self._entries)

    def save_next(self) -> None:
        """Copy one segment that is worth it and have it written; for when nothing runs, since it takes milliseconds."""
        for entry in self._entries:
            if entry.unsaved:
                self._save_segment(entry)
                return

    def close(self) -> None:
        """Store what is long, newest first, for at most two seconds, and close the store. Entries stay."""
        if self._store is None:
            return
        end = time.monotonic() + SAVE_AT_END_S
        for entry in reversed(self._entries):
            if len(entry.tokens) >= SAVE_AT_END_FROM:
                entry.wanted = len(entry.tokens)
            while self._store.writable and entry.unsaved and (left := end - time.monotonic()) > 0:
                self._save_segment(entry, left)
        self._store.close()

    def abandon(self) -> None:
        """Its sequences belong to a device that hangs: touch none of them any more."""
        self._entries.clear()
        if self._store is not None:
            self._store.close()

    def _save_segment(self, entry: _Entry, timeout: float = 0) -> None:
        """The next one of ``entry``, unless it is in the store already."""
        assert self._store is not None
        place = entry.stored
        start, stop = place * SEGMENT, (place + 1) * SEGMENT
        name = list(self._store.names(entry.tokens[:stop].tolist(), entry.kind))[place]
        if not self._store.touch(place, name):
            try:
                snapshot = entry.sequence.snapshot(start, stop)
            except DeviceError:
                snapshot = None
            if snapshot is None:  # a device without snapshots
                entry.wanted = 0
                return
            if not self._store.save(place, name, snapshot, timeout):
                return
        entry.stored += 1

    def check_integrity(self) -> None:
        """Raise AssertionError if the bookkeeping contradicts itself."""
        for entry in self._entries:
            assert entry.sequence.length == len(entry.tokens), "an entry's sequence has changed"
        assert self.nbytes <= self._max_bytes, "more kept than allowed"
        assert len({id(entry.sequence) for entry in self._entries}) == len(self._entries), "a sequence is kept twice"

    def _find(self, tokens: Sequence[int], kind: Kind) -> tuple[_Entry | None, int]:
        """The entry with the longest common prefix; of equal ones the most recently used."""
        best: tuple[_Entry | None, int] = (None, 0)
        for entry in self._entries:
            if entry.kind == kind:
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
