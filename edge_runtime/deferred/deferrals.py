"""Deferred requests as callers see them: put in, looked at by their id, taken out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.deferred.answers import Done, Failed, pack, read
from edge_runtime.deferred.queue import Entry, Queue, State
from edge_runtime.deferred.worker import Answer, Worker
from edge_runtime.errors import StorageError
from edge_runtime.locks import HeldLock
from edge_runtime.policy.rules import Deferred
from edge_runtime.prompts import TierRequest
from edge_runtime.tiers.network import Canceller


@dataclass(frozen=True)
class Ticket:
    """A deferred request."""

    id: str
    created: float
    """Unix seconds."""
    state: State
    waits_for: str | None
    """Why it has not been answered yet, once that was tried."""
    answer: Done | None
    failure: Failed | None


class Deferrals:
    """Methods may be called from any thread."""

    def __init__(
        self, path: Path, loop: asyncio.AbstractEventLoop, answer: Answer, bounds: Callable[[], Deferred]
    ) -> None:
        """StorageError."""
        self._queue = Queue(path, patient=True)
        self._bounds = bounds
        self._loop = loop
        self._worker: Worker | None = None
        self._canceller = Canceller(loop)
        lock = HeldLock(path.with_suffix(".lock"))

        async def work() -> None:
            self._worker = Worker(self._queue, lock, answer, bounds)
            await self._worker.run()

        self._canceller.start(work())

    def add(self, request: TierRequest) -> str:
        """Its id, once it is on the disk. QueueFull, InvalidRequest, StorageError."""
        name = self._queue.add(pack(request), self._bounds())
        self._loop.call_soon_threadsafe(self._wake)
        return name

    def _wake(self) -> None:
        if self._worker is not None:
            self._worker.wake()

    def get(self, name: str) -> Ticket | None:
        entry = self._queue.get(name)
        return None if entry is None else ticket(entry)

    def all(self) -> list[Ticket]:
        """Oldest first."""
        return [ticket(entry) for entry in self._queue.entries()]

    def remove(self, name: str) -> bool:
        """Whether it was there. What is being answered is answered, and nobody will know."""
        return self._queue.remove(name)

    def close(self) -> None:
        """Once the loop is closed."""
        self._queue.close()


def ticket(entry: Entry) -> Ticket:
    """One whose result is damaged has failed: it hides no other."""
    state, result = entry.state, entry.result or b""
    answer = failure = None
    try:
        if state == "done":
            answer = read(result, Done)
        elif state == "failed":
            failure = read(result, Failed)
    except StorageError as error:
        state, failure = "failed", Failed(str(error), 500)
    return Ticket(entry.id, entry.created, state, entry.waits_for, answer, failure)
