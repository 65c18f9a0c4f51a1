"""The way of chunks from the engine's thread to whoever asked."""

from __future__ import annotations

import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Protocol

from msgspec.structs import replace

from edge_runtime.request import LOCAL, Chunk, Usage
from edge_runtime.route import Route, only_local
from edge_runtime.tracing.trace import Trace


class Generation(Protocol):
    """The answer to one request, as it is made. Iterate it from one thread or one event loop."""

    @property
    def usage(self) -> Usage:
        """Tokens so far."""

    @property
    def route(self) -> Route:
        """Who answers, and why; known once :meth:`opened` has returned, or with the first chunk."""

    async def opened(self) -> None:
        """Wait until it stands who answers. Raises what a request fails with of which nothing was passed on."""

    def __iter__(self) -> Generation: ...

    def __next__(self) -> Chunk:
        """Wait for the next chunk. Failures come as chunks, see :class:`~edge_runtime.request.Chunk`."""

    def __aiter__(self) -> Generation: ...

    async def __anext__(self) -> Chunk: ...

    def cancel(self) -> None:
        """End it within one step; its chunks end with ``finish_reason="cancelled"``. Idempotent, any thread."""

    def close(self) -> None:
        """Cancel it and drop what has not been read. Leaving a ``with`` block does this. Idempotent, any thread."""

    def __enter__(self) -> Generation: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Outlet:
    """A queue of chunks from one writer, the engine's thread, to one reader, a thread or an event loop.

    A chunk costs the engine one call of a queue and one wake-up; it never waits for its reader.
    """

    def __init__(self, prompt_tokens: int, completions: int, trace: Trace | None = None) -> None:
        """``trace``: is told when a chunk was passed on."""
        self._trace = trace
        self.cancelled = False
        """The reader's wish, read by the engine before each step."""
        self.listener: Callable[[], None] | None = None
        """Called after each chunk, on the engine's thread: for a reader that must not block. The reader sets it, then
        polls, then waits for it to be called."""
        self._prompt_tokens = prompt_tokens
        self.completion_tokens = 0
        """Sampled so far; counted by the engine."""
        self._cached_tokens = 0
        self.sent = False
        """A chunk was passed on."""
        self._unfinished = completions
        self._chunks: SimpleQueue[Chunk | None] = SimpleQueue()
        """At its end None, which stays there."""
        self._dropped = False

    def set_usage(self, usage: Usage) -> None:
        """Where tokens are counted by somebody else."""
        self._prompt_tokens, self.completion_tokens = usage.prompt_tokens, usage.completion_tokens
        self._cached_tokens = usage.cached_tokens

    def set_cached(self, tokens: int) -> None:
        """Engine: so many of the prompt's tokens need not be computed."""
        self._cached_tokens = tokens

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        return Usage(self._prompt_tokens, self.completion_tokens, self._cached_tokens)

    def put(self, chunk: Chunk) -> None:
        """Engine: pass a chunk on. The one that ends the last completion gets the usage."""
        self.sent = True
        if self._dropped:
            return
        if self._trace is not None:
            self._trace.put_at = time.perf_counter_ns()
        if chunk.finish_reason is None:
            self._chunks.put(chunk)
        else:
            self._unfinished -= 1
            last = self._unfinished == 0
            self._chunks.put(replace(chunk, usage=self.usage) if last else chunk)
            if last:
                self._chunks.put(None)
        self._call_listener()

    def wait(self) -> Chunk | None:
        """Reader: the next chunk; None when there are no more."""
        while True:
            try:
                return self._checked(self._chunks.get(timeout=0.5))
            except Empty:  # a timeout, because Windows delivers Ctrl-C only between waits
                continue

    def poll(self) -> tuple[bool, Chunk | None]:
        """Reader: (True, what :meth:`wait` gives), or (False, None) if it would wait."""
        if self._chunks.empty():
            return False, None
        return True, self._checked(self._chunks.get())

    def end(self) -> None:
        """Writer: what is still to come, comes another way."""
        self._chunks.put(None)
        self._call_listener()

    def drop(self) -> None:
        """Reader: wants nothing more."""
        self._dropped = True
        self._chunks.put(None)
        self._call_listener()

    def _checked(self, chunk: Chunk | None) -> Chunk | None:
        if chunk is None or self._dropped:
            self._chunks.put(None)
            return None
        return chunk

    def _call_listener(self) -> None:
        listener = self.listener
        if listener is not None:
            listener()


class EngineGeneration:
    """:class:`Generation` over an :class:`Outlet`. Forgetting it cancels it."""

    def __init__(self, outlet: Outlet) -> None:
        self._outlet = outlet
        self.route = only_local()
        self._tier: str | None = None
        """What its chunks are to be called, if not as the engine does."""

    def routed(self, route: Route) -> None:
        """It is the answer of the tier that ``route`` names. Before it is iterated."""
        self.route = route
        self._tier = None if route.tier == LOCAL else route.tier

    @property
    def usage(self) -> Usage:
        return self._outlet.usage

    async def opened(self) -> None:
        return

    def __iter__(self) -> EngineGeneration:
        return self

    def __next__(self) -> Chunk:
        chunk = self._outlet.wait()
        if chunk is None:
            raise StopIteration
        return chunk if self._tier is None else replace(chunk, tier=self._tier)

    def __aiter__(self) -> EngineGeneration:
        return self

    async def __anext__(self) -> Chunk:
        ready, chunk = self._outlet.poll()
        if not ready:
            chunk = await self._arrival()
        if chunk is None:
            raise StopAsyncIteration
        return chunk if self._tier is None else replace(chunk, tier=self._tier)

    async def _arrival(self) -> Chunk | None:
        import asyncio  # late: it brings ssl, and 40 ms, for those who iterate from a thread too

        outlet = self._outlet
        loop = asyncio.get_running_loop()
        arrived = asyncio.Event()

        def tell() -> None:
            try:
                loop.call_soon_threadsafe(arrived.set)
            except RuntimeError:  # the loop was closed: nobody reads any more, and the engine's thread must not suffer
                outlet.cancelled = True

        outlet.listener = tell
        try:
            while True:
                ready, chunk = outlet.poll()
                if ready:
                    return chunk
                await arrived.wait()
                arrived.clear()
        finally:
            outlet.listener = None

    def cancel(self) -> None:
        self._outlet.cancelled = True

    def close(self) -> None:
        self.cancel()
        self._outlet.drop()

    def __enter__(self) -> EngineGeneration:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self._outlet.cancelled = True  # no locks here: this may run anywhere; the engine sees it before its next step
