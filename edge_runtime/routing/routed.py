"""An answer that a tier is still to be found for, as whoever asked sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress

from msgspec.structs import replace

from edge_runtime.errors import EdgeError, EngineStopped
from edge_runtime.generation import EngineGeneration, Generation, Outlet
from edge_runtime.request import Chunk, Usage
from edge_runtime.route import Route
from edge_runtime.stages.protocols import TextFilter
from edge_runtime.tiers.network import Canceller
from edge_runtime.tracing.trace import Lane


class Call:
    """The asking side of a request, for the coroutine that has it answered."""

    def __init__(
        self,
        prompt_tokens: int,
        n: int,
        route: Route,
        make_filter: Callable[[], TextFilter | None] = lambda: None,
        lane: Lane | None = None,
    ) -> None:
        """``make_filter``: of what stages make of a completion's text. ``lane``: of the coroutine."""
        self.lane = lane
        self.route = route
        self._filters = [made for _ in range(n) if (made := make_filter()) is not None]
        self.outlet = Outlet(prompt_tokens, n, None if lane is None else lane.trace)
        self.decided: Future[Route] = Future()
        """Set before the first chunk is passed on."""
        self.rest: Generation | None = None
        """What goes on where the outlet ends: a model's own answer, which then takes no further step through here."""
        self._open = set(range(n))

    @property
    def plain(self) -> bool:
        """Chunks are passed on as they are."""
        return not self._filters

    def hand_over(self, rest: Generation) -> None:
        """Whoever asked reads the rest there."""
        self.rest = rest
        if self.outlet.cancelled:  # just now, by somebody who did not know of it yet
            rest.close()
        self.outlet.end()

    def decide(self, tier: str, reason: str) -> None:
        """Its answer is passed on from now on. Once only."""
        self.route.tier, self.route.reason = tier, reason
        with suppress(InvalidStateError):  # whoever asked has left
            self.decided.set_result(self.route)

    def put(self, chunk: Chunk, usage: Usage | None) -> None:
        """Pass a chunk on; ``usage``: so far. None: nobody counts, and a piece is taken for a token."""
        if usage is not None:
            self.outlet.set_usage(usage)
        elif chunk.text:
            self.outlet.completion_tokens += 1
        if self._filters:
            chunk = self._filtered(chunk)
        if chunk.finish_reason is not None:
            self._open.discard(chunk.index)
        self.outlet.put(chunk)

    def _filtered(self, chunk: Chunk) -> Chunk:
        filter = self._filters[chunk.index]
        text = filter.add(chunk.text) if chunk.text else ""
        return replace(chunk, text=text + filter.flush() if chunk.finish_reason is not None else text)

    def fail(self, error: EdgeError) -> None:
        """End what is open with ``error``."""
        with suppress(InvalidStateError):
            self.decided.set_exception(error)
        self._end(Chunk(finish_reason="error", error=error))

    def cancel(self) -> None:
        """End what is open: nobody wants it any more, or it is the end."""
        with suppress(InvalidStateError):
            self.decided.set_exception(EngineStopped("the answer was cut off"))
        self._end(Chunk(finish_reason="cancelled"))

    def _end(self, chunk: Chunk) -> None:
        """What was held of a text comes with it."""
        for index in sorted(self._open):
            self.put(replace(chunk, index=index, tier=self.route.tier or "none"), None)

    @property
    def finished(self) -> bool:
        return not self._open


class RoutedGeneration(EngineGeneration):
    """:class:`~edge_runtime.generation.Generation` over a :class:`Call`. Forgetting it cancels it."""

    def __init__(self, call: Call, canceller: Canceller) -> None:
        super().__init__(call.outlet)
        self.route = call.route
        self._call = call
        self._canceller = canceller
        self._handed_over = False

    @property
    def usage(self) -> Usage:
        rest = self._call.rest
        return super().usage if rest is None else rest.usage

    async def opened(self) -> None:
        decided = asyncio.wrap_future(self._call.decided)
        decided.add_done_callback(_looked_at)
        await asyncio.shield(decided)

    def __next__(self) -> Chunk:
        if not self._handed_over:
            try:
                return super().__next__()
            except StopIteration:
                self._handed_over = True
        if self._call.rest is None:
            raise StopIteration
        return stamped(next(self._call.rest), self.route.tier)

    async def __anext__(self) -> Chunk:
        if not self._handed_over:
            try:
                return await super().__anext__()
            except StopAsyncIteration:
                self._handed_over = True
        if self._call.rest is None:
            raise StopAsyncIteration
        return stamped(await anext(self._call.rest), self.route.tier)

    def cancel(self) -> None:
        super().cancel()
        self._canceller.cancel()
        if self._call.rest is not None:
            self._call.rest.cancel()

    def close(self) -> None:
        super().close()
        if self._call.rest is not None:
            self._call.rest.close()

    def __del__(self) -> None:
        super().__del__()
        if not self._call.finished:
            self._canceller.cancel()


def _looked_at(decided: asyncio.Future[Route]) -> None:
    """asyncio need not complain of a failure that nobody waits for any more."""
    if not decided.cancelled():
        decided.exception()


def stamped(chunk: Chunk, tier: str) -> Chunk:
    """The chunk as ``tier``'s."""
    return chunk if chunk.tier == tier else replace(chunk, tier=tier)
