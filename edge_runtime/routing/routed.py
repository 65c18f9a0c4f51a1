"""An answer that a tier is still to be found for, as whoever asked sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress

from msgspec.structs import replace

from edge_runtime.errors import EdgeError, EngineStopped
from edge_runtime.generation import EngineGeneration, Outlet
from edge_runtime.request import Chunk, Usage
from edge_runtime.route import Route
from edge_runtime.stages.protocols import TextFilter
from edge_runtime.tiers.network import Canceller


class Call:
    """The asking side of a request, for the coroutine that has it answered."""

    def __init__(
        self, prompt_tokens: int, n: int, route: Route, make_filter: Callable[[], TextFilter | None] = lambda: None
    ) -> None:
        """``make_filter``: of what stages make of a completion's text."""
        self.route = route
        self._filters = [made for _ in range(n) if (made := make_filter()) is not None]
        self.outlet = Outlet(prompt_tokens, n)
        self.decided: Future[Route] = Future()
        """Set before the first chunk is passed on."""
        self._open = set(range(n))

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

    async def opened(self) -> None:
        await asyncio.shield(asyncio.wrap_future(self._call.decided))

    def cancel(self) -> None:
        super().cancel()
        self._canceller.cancel()

    def __del__(self) -> None:
        super().__del__()
        if not self._call.finished:
            self._canceller.cancel()


def stamped(chunk: Chunk, tier: str) -> Chunk:
    """The chunk as ``tier``'s."""
    return chunk if chunk.tier == tier else replace(chunk, tier=tier)
