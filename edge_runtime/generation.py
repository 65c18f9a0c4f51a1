"""The way of chunks from the engine's thread to whoever asked."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import Protocol

from edge_runtime.request import Chunk, Usage


class Generation(Protocol):
    """The answer to one request, as it is made. Iterate it from one thread or one event loop."""

    @property
    def usage(self) -> Usage:
        """Tokens so far."""

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
    """A queue of chunks from one writer, the engine's thread, to one reader, a thread or an event loop."""

    def __init__(self, prompt_tokens: int, completions: int) -> None:
        self.cancelled = False
        """The reader's wish, read by the engine before each step."""
        self._prompt_tokens = prompt_tokens
        self._completion_tokens = 0
        self._cached_tokens = 0
        self._unfinished = completions
        self._chunks: deque[Chunk] = deque()
        self._changed = threading.Condition()
        self._listener: Callable[[], None] | None = None

    def count_token(self) -> None:
        """Engine: one more was sampled."""
        self._completion_tokens += 1

    def set_cached(self, tokens: int) -> None:
        """Engine: so many of the prompt's tokens need not be computed."""
        self._cached_tokens = tokens

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        return Usage(self._prompt_tokens, self._completion_tokens, self._cached_tokens)

    def put(self, chunk: Chunk) -> None:
        """Engine: pass a chunk on. The one that ends the last completion gets the usage."""
        with self._changed:
            if not self._unfinished:
                return  # dropped
            if chunk.finish_reason is not None:
                self._unfinished -= 1
                if self._unfinished == 0:
                    chunk = replace(chunk, usage=self.usage)
            self._chunks.append(chunk)
            listener, self._listener = self._listener, None
            self._changed.notify()
        if listener is not None:
            listener()

    def wait(self) -> Chunk | None:
        """Reader: the next chunk; None when there are no more."""
        with self._changed:
            # with a timeout, because Windows delivers Ctrl-C only between waits
            while not self._changed.wait_for(lambda: self._chunks or not self._unfinished, timeout=0.5):
                pass
            return self._chunks.popleft() if self._chunks else None

    def take_or_listen(self, listener: Callable[[], None]) -> tuple[bool, Chunk | None]:
        """Reader: (True, what :meth:`wait` gives), or (False, None) and ``listener`` is called once when there is more.

        The listener runs on the engine's thread.
        """
        with self._changed:
            if self._chunks or not self._unfinished:
                return True, self._chunks.popleft() if self._chunks else None
            self._listener = listener
            return False, None

    def drop(self) -> None:
        """Reader: wants nothing more."""
        with self._changed:
            self._chunks.clear()
            self._unfinished = 0
            listener, self._listener = self._listener, None
            self._changed.notify_all()
        if listener is not None:
            listener()


class EngineGeneration:
    """:class:`Generation` over an :class:`Outlet`. Forgetting it cancels it."""

    def __init__(self, outlet: Outlet, wake: Callable[[], None]) -> None:
        self._outlet = outlet
        self._wake = wake

    @property
    def usage(self) -> Usage:
        return self._outlet.usage

    def __iter__(self) -> EngineGeneration:
        return self

    def __next__(self) -> Chunk:
        chunk = self._outlet.wait()
        if chunk is None:
            raise StopIteration
        return chunk

    def __aiter__(self) -> EngineGeneration:
        return self

    async def __anext__(self) -> Chunk:
        loop = asyncio.get_running_loop()
        arrived = asyncio.Event()

        def tell() -> None:
            try:
                loop.call_soon_threadsafe(arrived.set)
            except RuntimeError:  # the loop was closed: nobody reads any more, and the engine's thread must not suffer
                self._outlet.cancelled = True

        while True:
            ready, chunk = self._outlet.take_or_listen(tell)
            if ready:
                if chunk is None:
                    raise StopAsyncIteration
                return chunk
            await arrived.wait()
            arrived.clear()

    def cancel(self) -> None:
        if not self._outlet.cancelled:
            self._outlet.cancelled = True
            self._wake()

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
