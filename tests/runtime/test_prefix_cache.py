"""The prefix cache agrees with a naive twin, over the fake decoder."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.base import DecoderSequence, Step
from edge_runtime.errors import OutOfSequences
from edge_runtime.prefix_cache import PrefixCache
from edge_runtime.request import Kind
from tests.fake_decoder import BLOCK, FakeDecoder

BLOCK_BYTES = BLOCK * 8
"""Of the fake decoder's KV cache."""


def nbytes(tokens: Sequence[int]) -> int:
    return -(-len(tokens) // BLOCK) * BLOCK_BYTES


class NaivePrefixCache:
    """What is kept, as plain lists in the order of last use; no device."""

    def __init__(self, max_bytes: int, min_tokens: int, kv_block: int) -> None:
        self.max_bytes, self.min_tokens, self.kv_block = max_bytes, min_tokens, kv_block
        self.kept: list[tuple[list[int], bool]] = []

    def match(self, tokens: Sequence[int], long_rope: bool) -> int:
        return self._best(tokens, long_rope)[1]

    def acquire(self, tokens: Sequence[int], room: bool, long_rope: bool) -> list[int]:
        best, length = self._best(tokens, long_rope)
        if not room:
            others = [entry for entry in self.kept if entry is not best]
            if others:
                self.kept.remove(others[0])
            elif best is not None:
                self.kept.remove(best)
                return best[0][:length]
        if best is None:
            return []
        self.kept.remove(best)
        if tokens[: len(best[0])] != best[0]:
            self.kept.append(best)
        return best[0][:length]

    def put(self, tokens: list[int], long_rope: bool) -> None:
        if not tokens or nbytes(tokens) > self.max_bytes:
            return
        longer = [e for e in self.kept if e[1] == long_rope and e[0][: len(tokens)] == tokens]
        if longer:
            self.kept.remove(longer[0])
            self.kept.append(longer[0])
            return
        self.kept = [e for e in self.kept if e[1] != long_rope or tokens[: len(e[0])] != e[0]]
        self.kept.append((tokens, long_rope))
        while sum(nbytes(e[0]) for e in self.kept) > self.max_bytes:
            del self.kept[0]

    def _best(self, tokens: Sequence[int], long_rope: bool) -> tuple[tuple[list[int], bool] | None, int]:
        best: tuple[tuple[list[int], bool] | None, int] = (None, 0)
        for entry in self.kept:
            if entry[1] == long_rope:
                common = 0
                while common < min(len(tokens) - 2, len(entry[0])) and entry[0][common] == tokens[common]:
                    common += 1
                while common % self.kv_block:
                    common -= 1
                if common >= max(best[1], self.min_tokens):
                    best = (entry, common)
        return best


def held(sequence: DecoderSequence | None) -> list[int]:
    return [] if sequence is None else [int(t) for t in sequence.tokens()]  # type: ignore[attr-defined]  # a fake one


def filled(decoder: FakeDecoder, tokens: Sequence[int], long_rope: bool = False) -> DecoderSequence:
    sequence = decoder.open_sequence(long_rope)
    decoder.forward([Step(sequence, np.asarray(tokens, np.int64), 0)])
    return sequence


Tokens = st.lists(st.integers(0, 1), min_size=1, max_size=9)
Action = st.one_of(
    st.tuples(st.just("put"), Tokens, st.booleans()),
    st.tuples(st.just("acquire"), Tokens, st.booleans()),
    st.tuples(st.just("evict"), st.just([]), st.just(False)),
)


@settings(max_examples=300)
@given(
    actions=st.lists(Action, max_size=25),
    max_bytes=st.integers(0, 12 * BLOCK_BYTES),
    min_tokens=st.integers(1, 3),
    kv_block=st.integers(1, 3),
)
def test_agrees_with_the_naive_twin(
    actions: list[tuple[str, list[int], bool]], max_bytes: int, min_tokens: int, kv_block: int
) -> None:
    decoder = FakeDecoder(max_sequences=4, kv_tokens=4096)
    limits = max_bytes, min_tokens, kv_block
    cache, naive = PrefixCache(*limits), NaivePrefixCache(*limits)
    for action, tokens, long_rope in actions:
        room = len(decoder.sequences) < decoder.limits.max_sequences
        if action == "evict":
            assert cache.evict() == bool(naive.kept)
            naive.kept = naive.kept[1:]
        elif action == "acquire":
            assert cache.match(tokens, Kind(long_rope)) == naive.match(tokens, long_rope)
            sequence = cache.acquire(tokens, room, Kind(long_rope))
            assert held(sequence) == naive.acquire(tokens, room, long_rope)
            if sequence is not None:
                sequence.close()
            assert len(decoder.sequences) < decoder.limits.max_sequences
        else:
            if not room:
                cache.evict()
                naive.kept = naive.kept[1:]
            cache.put(tokens, filled(decoder, tokens, long_rope), Kind(long_rope))
            naive.put(tokens, long_rope)
        cache.check_integrity()
        decoder.check_integrity()
        assert len(decoder.sequences) == len(cache) == len(naive.kept)
        assert cache.nbytes == sum(nbytes(entry[0]) for entry in naive.kept)
        assert cache.tokens == sum(len(entry[0]) for entry in naive.kept)
    while cache.evict():
        pass
    assert not decoder.sequences


def test_a_fork_leaves_the_entry_for_others() -> None:
    decoder = FakeDecoder()
    cache = PrefixCache(1000, 1)
    cache.put([1, 2, 3, 4, 5], filled(decoder, [1, 2, 3, 4, 5]))
    forks = [cache.acquire([1, 2, 3, 9, 9], True) for _ in range(2)]
    assert [held(fork) for fork in forks] == [[1, 2, 3]] * 2
    assert cache.match([1, 2, 3, 4, 5, 6, 7]) == 5


def test_the_last_two_tokens_are_never_taken_from_the_cache() -> None:
    decoder = FakeDecoder()
    cache = PrefixCache(1000, 1)
    cache.put([1, 2, 3, 4], filled(decoder, [1, 2, 3, 4]))
    assert held(cache.acquire([1, 2, 3, 4], True)) == [1, 2]


def test_only_whole_blocks_are_taken() -> None:
    decoder = FakeDecoder()
    cache = PrefixCache(1000, 1, kv_block=4)
    cache.put(list(range(11)), filled(decoder, list(range(11))))
    assert cache.match([0, 1, 2, 9, 9, 9, 9]) == 0
    assert held(cache.acquire(list(range(30)), True)) == list(range(8))
    assert len(cache) == 0  # the entry itself, for it was a prefix as a whole


def test_without_kv_cache_for_a_fork_the_entry_itself_is_given() -> None:
    decoder = FakeDecoder(max_sequences=1)
    cache = PrefixCache(1000, 1)
    cache.put([1, 2, 3], filled(decoder, [1, 2, 3]))
    assert held(cache.acquire([1, 2, 9, 9], True)) == [1, 2]  # room was promised wrongly; fork refuses
    assert len(cache) == 0


def test_nothing_to_give_and_no_room_is_an_error() -> None:
    with pytest.raises(OutOfSequences):
        PrefixCache(1000).acquire([1, 2], False)


def test_a_wrong_length_is_refused() -> None:
    decoder = FakeDecoder()
    with pytest.raises(ValueError, match="holds 2 tokens"):
        PrefixCache(1000).put([1, 2, 3], filled(decoder, [1, 2]))
