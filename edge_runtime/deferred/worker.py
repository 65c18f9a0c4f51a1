"""Has deferred requests answered, a few at a time, whenever the tier that should answer them can be asked."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress

import msgspec

from edge_runtime.deferred.answers import Done, Failed, passing, unpack
from edge_runtime.deferred.queue import Entry, Queue
from edge_runtime.errors import EdgeError, TierUnavailable
from edge_runtime.locks import HeldLock
from edge_runtime.policy.rules import Deferred
from edge_runtime.prompts import TierRequest

_log = logging.getLogger("edge_glm.deferred")
AT_ONCE = 4
LOOK_S = 2.0
"""Between two looks at the queue; what this process adds is seen at once."""
FIRST_WAIT_S, LONGEST_WAIT_S = 2.0, 120.0
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
            while not await asyncio.to_thread(self._lock.try_acquire):
                await self._rest()
            await asyncio.to_thread(self._queue.put_back)
            while True:
                try:
                    await self._start_what_is_due()
                except EdgeError as error:
                    _log.error("deferred requests wait: %s", error)
                await self._rest()
        finally:
            for task in self._running:
                task.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)
            self._lock.release()

    async def _start_what_is_due(self) -> None:
        while len(self._running) < AT_ONCE:
            entry = await asyncio.to_thread(self._queue.take, self._bounds())
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
            done = await self._answer(entry.id, unpack(entry.body))
        except asyncio.CancelledError:
            self._queue.wait(entry.id, "the process ended", 0)
            raise
        except EdgeError as error:
            if passing(error):
                wait = LOOK_S if isinstance(error, TierUnavailable) else _wait(entry.attempts)
                await asyncio.to_thread(self._queue.wait, entry.id, str(error), wait)
            else:
                await self._fail(entry, str(error), 400)
        except Exception as error:
            _log.exception("a deferred request failed")
            await self._fail(entry, f"internal error, {type(error).__name__}: {error}", 500)
        else:
            await asyncio.to_thread(self._queue.finish, entry.id, "done", msgspec.json.encode(done))

    async def _fail(self, entry: Entry, why: str, status: int) -> None:
        await asyncio.to_thread(self._queue.finish, entry.id, "failed", msgspec.json.encode(Failed(why, status)))

    async def _rest(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(LOOK_S):  # wait_for may swallow a cancellation before Python 3.12
                await self._news.wait()
        self._news.clear()


def _wait(attempts: int) -> float:
    """Seconds until the next attempt."""
    return float(min(FIRST_WAIT_S * 2 ** min(attempts - 1, 16), LONGEST_WAIT_S))
