"""Has deferred requests answered, a few at a time, whenever the tier that should answer them can be asked."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import TypeVar

import msgspec

from edge_runtime.deferred.answers import Done, Failed, passing, unpack
from edge_runtime.deferred.queue import Entry, Queue
from edge_runtime.errors import EdgeError, StorageError, TierUnavailable
from edge_runtime.locks import HeldLock
from edge_runtime.policy.rules import Deferred
from edge_runtime.prompts import TierRequest

_log = logging.getLogger("edge_glm.deferred")
AT_ONCE = 4
LOOK_S = 2.0
"""Between two looks at the queue; what this process adds is seen at once."""
FIRST_WAIT_S, LONGEST_WAIT_S = 2.0, 120.0
T = TypeVar("T")
Answer = Callable[[str, TierRequest], Awaitable[Done]]
"""Id and request → the answer. EdgeError."""


class Worker:
    """Belongs to an event loop. Of several processes on one queue, one works; another takes over when it ends."""

    def __init__(self, queue: Queue, lock: HeldLock, answer: Answer, bounds: Callable[[], Deferred]) -> None:
        self._queue = queue
        self._lock = lock
        self._answer = answer
        self._bounds = bounds
        self._news = asyncio.Event()
        self._running: set[asyncio.Task[None]] = set()

    def wake(self) -> None:
        """There may be something to do."""
        self._news.set()

    async def run(self) -> None:
        """Until it is cancelled; what is running then goes back into the queue."""
        try:
            while not await self._on_disk(self._lock.try_acquire):
                await self._rest()
            await self._on_disk(self._queue.put_back)
            while True:
                await self._start_what_is_due()
                await self._rest()
        finally:
            for task in self._running:
                task.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)
            self._lock.release()

    async def _start_what_is_due(self) -> None:
        while len(self._running) < AT_ONCE:
            entry = await self._on_disk(lambda: self._queue.take(self._bounds()))
            if entry is None:
                return
            task = asyncio.create_task(self._have_answered(entry))
            self._running.add(task)
            task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self.wake()

    async def _have_answered(self, entry: Entry) -> None:
        try:
            keep = await self._outcome(entry)
        except asyncio.CancelledError:
            with suppress(EdgeError):  # whoever works next puts it back
                self._queue.wait(entry.id, "the process ended", 0)
            raise
        await self._on_disk(keep)

    async def _outcome(self, entry: Entry) -> Callable[[], None]:
        """What writes into the queue what has become of it."""
        try:
            done = await self._answer(entry.id, unpack(entry.body))
        except EdgeError as error:
            if passing(error):
                wait = LOOK_S if isinstance(error, TierUnavailable) else _wait(entry.attempts)
                return partial(self._queue.wait, entry.id, str(error), wait)
            return self._failure(entry, str(error), 500 if isinstance(error, StorageError) else 400)
        except Exception as error:
            _log.exception("a deferred request failed")
            return self._failure(entry, f"internal error, {type(error).__name__}: {error}", 500)
        return partial(self._queue.finish, entry.id, "done", msgspec.json.encode(done))

    def _failure(self, entry: Entry, why: str, status: int) -> Callable[[], None]:
        return partial(self._queue.finish, entry.id, "failed", msgspec.json.encode(Failed(why, status)))

    async def _on_disk(self, work: Callable[[], T]) -> T:
        """What ``work`` returns, tried until the disk plays along: an answer that was paid for is not dropped because
        there is no room for it just now. What is wrong is said once."""
        said = ""
        while True:
            try:
                done = await asyncio.to_thread(work)
            except EdgeError as error:
                if str(error) != said:
                    said = str(error)
                    _log.error("deferred requests wait: %s", said)
                await asyncio.sleep(LOOK_S)
            else:
                return done

    async def _rest(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(LOOK_S):  # wait_for may swallow a cancellation before Python 3.12
                await self._news.wait()
        self._news.clear()


def _wait(attempts: int) -> float:
    """Seconds until the next attempt."""
    return float(min(FIRST_WAIT_S * 2 ** min(attempts - 1, 16), LONGEST_WAIT_S))
