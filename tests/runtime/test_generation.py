"""The queue between the engine's thread and a reader: nothing is lost, nobody waits for ever."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import time

import pytest

from edge_runtime.generation import EngineGeneration, Outlet
from edge_runtime.request import Chunk, Usage
from tests.server.served import wait_until

CHUNKS = 2000


def write(outlet: Outlet) -> threading.Thread:
    """Puts numbered chunks from a thread of its own, with and without pauses, and ends."""

    def run() -> None:
        chance = random.Random(1)
        for number in range(CHUNKS):
            if chance.random() < 0.05:
                time.sleep(chance.random() * 1e-3)
            outlet.completion_tokens += 1
            outlet.put(Chunk(token_ids=(number,), finish_reason="length" if number == CHUNKS - 1 else None))

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def check(chunks: list[Chunk]) -> None:
    assert [token for chunk in chunks for token in chunk.token_ids] == list(range(CHUNKS))
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (CHUNKS - 1)
    assert chunks[-1].usage == Usage(3, CHUNKS)


def test_a_thread_reads_all_in_order() -> None:
    outlet = Outlet(3, 1)
    thread = write(outlet)
    generation = EngineGeneration(outlet)
    check(list(generation))
    assert list(generation) == [], "the end stays"
    thread.join()


@pytest.mark.parametrize("timeout", [None, 1e-5, 1e-4])
def test_an_event_loop_reads_all_in_order(timeout: float | None) -> None:
    """``timeout``: the reader gives up and asks again, again and again."""
    outlet = Outlet(3, 1)
    thread = write(outlet)
    chunks: list[Chunk] = []

    async def read() -> None:
        generation = EngineGeneration(outlet)
        with contextlib.suppress(StopAsyncIteration):
            while True:
                with contextlib.suppress(TimeoutError):
                    chunks.append(await asyncio.wait_for(generation.__anext__(), timeout))
        assert [chunk async for chunk in generation] == [], "the end stays"
        assert outlet.listener is None

    asyncio.run(asyncio.wait_for(read(), 60))
    check(chunks)
    thread.join()


def test_one_reader_after_the_other() -> None:
    outlet = Outlet(3, 1)
    thread = write(outlet)
    generation = EngineGeneration(outlet)

    async def some(count: int) -> list[Chunk]:
        return [await generation.__anext__() for _ in range(count)]

    chunks = asyncio.run(some(100)) + [next(generation) for _ in range(100)] + asyncio.run(some(100))
    check([*chunks, *generation])
    thread.join()


def test_closing_ends_a_reader_that_waits() -> None:
    outlet = Outlet(3, 1)
    generation = EngineGeneration(outlet)
    got: list[Chunk] = []
    reader = threading.Thread(target=lambda: got.extend(generation))
    reader.start()
    outlet.put(Chunk("a"))
    wait_until(lambda: got)
    generation.close()
    outlet.put(Chunk("b"))
    reader.join(60)
    assert not reader.is_alive()
    assert [chunk.text for chunk in got] == ["a"]
    assert outlet.cancelled


def test_closing_drops_what_was_not_read() -> None:
    outlet = Outlet(3, 2)
    for text in "abc":
        outlet.put(Chunk(text))
    generation = EngineGeneration(outlet)
    assert next(generation).text == "a"
    generation.close()
    outlet.put(Chunk("d", finish_reason="cancelled"))
    assert list(generation) == []
