"""What the scheduler puts into a batch, without a thread."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_runtime.completion import READING_CHUNK, Reading, Request
from edge_runtime.errors import OutOfKVCache
from edge_runtime.prefix_cache import PrefixCache
from edge_runtime.scheduler import Scheduler, Work
from tests.fake_decoder import FakeDecoder


class Endless(Request):
    """Repeats its id for ever."""

    reason: str | None = None

    @property
    def cancelled(self) -> bool:
        return False

    def take(self, logits: NDArray[np.float32]) -> None:
        self.tokens += [self.id] * len(logits)

    def finish(self, reason: str, error: Exception | None = None) -> None:
        self.finished, self.reason = True, reason


def make(decoder: FakeDecoder, *lengths: int) -> tuple[Scheduler, list[Endless]]:
    scheduler = Scheduler(decoder, PrefixCache(0))
    requests = [Endless(number, [number] * length) for number, length in enumerate(lengths)]
    for request in requests:
        scheduler.add(request)
    return scheduler, requests


def step(scheduler: Scheduler, decoder: FakeDecoder) -> list[tuple[int, int]]:
    """Run one batch; (request id, tokens) of each part."""
    batch = scheduler.next()
    for work, logits in zip(batch, decoder.forward([work.step for work in batch]), strict=True):
        work.request.take(logits)
    return [(work.request.id, len(work.step.tokens)) for work in batch]


def test_all_decode_rows_and_one_chunk() -> None:
    decoder = FakeDecoder(prefill_chunk=16)
    scheduler, _ = make(decoder, 3, 40, 20)
    assert [step(scheduler, decoder) for _ in range(6)] == [
        [(0, 3)],
        [(0, 1), (1, 16)],
        [(0, 1), (1, 16)],
        [(0, 1), (1, 8)],
        [(0, 1), (1, 1), (2, 16)],
        [(0, 1), (1, 1), (2, 4)],
    ]


def test_logits_only_at_the_end_of_a_prompt() -> None:
    decoder = FakeDecoder(prefill_chunk=16)
    scheduler, _ = make(decoder, 40)
    for _ in range(4):
        step(scheduler, decoder)
    assert decoder.batches == [[(16, 0)], [(16, 0)], [(8, 1)], [(1, 1)]]


def test_places_are_obeyed() -> None:
    decoder = FakeDecoder(max_sequences=2)
    scheduler, requests = make(decoder, 2, 2, 2)
    for _ in range(4):
        step(scheduler, decoder)
    assert scheduler.running == requests[:2]
    scheduler.release(requests[0], keep=False)
    step(scheduler, decoder)
    assert scheduler.running == requests[1:]


def test_kv_cache_decides_on_admission() -> None:
    decoder = FakeDecoder(kv_tokens=64)
    scheduler, requests = make(decoder, 30, 40, 2)
    for _ in range(4):
        step(scheduler, decoder)
    assert scheduler.running == requests[:1], "the short one must not overtake the long one"
    scheduler.release(requests[0], keep=False)
    for _ in range(4):
        step(scheduler, decoder)
    assert scheduler.running == requests[1:]


def full(scheduler: Scheduler, decoder: FakeDecoder) -> list[Work]:
    """Run until the KV cache is exhausted; the batch that did not fit."""
    while True:
        batch = scheduler.next()
        try:
            results = decoder.forward([work.step for work in batch])
        except OutOfKVCache:
            return batch
        for work, logits in zip(batch, results, strict=True):
            work.request.take(logits)


def test_the_youngest_gives_way_and_is_not_admitted_again_at_once() -> None:
    decoder = FakeDecoder(kv_tokens=64)
    scheduler, requests = make(decoder, 10, 10, 10)
    batch = scheduler.make_room(full(scheduler, decoder), OutOfKVCache("full"))
    assert [work.request for work in batch] == requests[:2]
    assert list(scheduler.waiting) == requests[2:]
    assert requests[2].sequence is None
    step(scheduler, decoder)
    assert scheduler.running == requests[:2]
    scheduler.release(requests[1], keep=False)
    scheduler.next()
    assert scheduler.running == [requests[0], requests[2]]


def test_cached_prefixes_give_way_first() -> None:
    decoder = FakeDecoder(kv_tokens=64)
    cache = PrefixCache(512)
    scheduler = Scheduler(decoder, cache)
    old = Endless(0, [9] * 30)
    scheduler.add(old)
    step(scheduler, decoder)
    step(scheduler, decoder)
    scheduler.release(old, keep=True)
    assert len(cache) == 1
    young = Endless(1, [1] * 20)
    scheduler.add(young)
    batch = full(scheduler, decoder)
    assert scheduler.make_room(batch, OutOfKVCache("full")) == batch
    assert len(cache) == 0
    assert scheduler.preemptions == 0


@pytest.mark.parametrize(("tokens", "reason"), [(21, "length"), (20, "error")])
def test_alone_in_a_full_cache(tokens: int, reason: str) -> None:
    decoder = FakeDecoder()
    scheduler, (request,) = make(decoder, 20)
    batch = scheduler.next()
    request.tokens = [1] * tokens
    assert scheduler.make_room(batch, OutOfKVCache("full")) == []
    assert request.reason == reason
    assert not decoder.sequences


def test_a_running_prefix_is_shared() -> None:
    decoder = FakeDecoder(prefill_chunk=64)
    cache = PrefixCache(0)
    scheduler = Scheduler(decoder, cache)
    first, second = (Endless(0, [1] * 32 + [2, 2]), Endless(1, [1] * 32 + [3, 3]))
    scheduler.add(first)
    step(scheduler, decoder)
    shared = scheduler._fork_running(second)
    assert shared is not None
    assert shared.length == 32


@pytest.mark.parametrize("invariant", [False, True])
def test_pairs_only_where_a_single_token_is_computed_otherwise(invariant: bool) -> None:
    decoder = FakeDecoder()
    decoder.limits = replace(decoder.limits, invariant=invariant)
    scheduler = Scheduler(decoder, PrefixCache(0), in_pairs=True)
    scheduler.add(Endless(0, [1] * 5))
    assert [step(scheduler, decoder) for _ in range(3)] == [[(0, 5)], *([[(0, 1 if invariant else 2)]] * 2)]


def test_scoring_reads_every_row_in_smaller_chunks() -> None:
    decoder = FakeDecoder(prefill_chunk=100)
    scheduler = Scheduler(decoder, PrefixCache(0))
    reading = Reading(0, list(range(60)) * 2, score=True)
    scheduler.add(reading)
    step(scheduler, decoder)
    step(scheduler, decoder)
    assert decoder.batches == [[(READING_CHUNK, READING_CHUNK)], [(120 - READING_CHUNK,) * 2]]
    assert isinstance(reading.result, Future)
    assert reading.result.result().shape == (119,)
