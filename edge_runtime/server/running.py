"""Runs a request's generations: started off the event loop, streamed on it, ended when the client leaves."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial

import anyio
import anyio.to_thread
from starlette.types import Receive

from edge_runtime.errors import EdgeError, EngineStopped
from edge_runtime.generation import Generation
from edge_runtime.request import Chunk, Usage
from edge_runtime.route import Route
from edge_runtime.server.errors import status_of
from edge_runtime.server.metrics import Watched
from edge_runtime.tracing.trace import current, enter, span

Start = Callable[[], Generation]
"""Renders, tokenizes and submits; blocks."""
Emit = Callable[[int, Chunk], Awaitable[None]]
"""Takes a chunk and the number of the generation it belongs to."""


class Running:
    """The generations of one request. ``async with`` starts them, and closes whatever started on any way out."""

    def __init__(self, starts: Sequence[Start], watched: Watched) -> None:
        self._starts = starts
        self._watched = watched
        self._whole = False
        """All has been read to the end."""
        self._release: Callable[[], None] | None = None
        self._outcome = "left"
        """Of what was not read to the end."""
        self._generations: list[Generation] = []

    def release_with(self, release: Callable[[], None]) -> None:
        """Call ``release``, once, when it is closed: the model may go then."""
        self._release = release

    async def __aenter__(self) -> Running:
        try:
            for start in self._starts:
                # The thread keeps what it started where a cancelled request can still close it.
                await anyio.to_thread.run_sync(self._start, start)
        except BaseException:
            self._close()
            raise
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._close()
        if self._generations:
            self._watched.end(self.usage(), len(self._generations))
            self._tell()
        release, self._release = self._release, None
        if release is not None:
            release()

    def _tell(self) -> None:
        lane, usage, route = current(), self.usage(), self.route
        if lane is not None:
            lane.trace.say(
                model=self._watched.model,
                tier=route.tier,
                task=route.task_class,
                prompt_tokens=usage.prompt_tokens,
                cached_tokens=usage.cached_tokens,
                completion_tokens=usage.completion_tokens,
                outcome="whole" if self._whole else self._outcome,
            )
            first = self._watched.first_at
            latency = {
                "ttft_ms": None if first is None else (1e9 * first - lane.trace.started) / 1e6,
                "wanted_ttft_ms": route.wanted_ttft_ms,
                "wanted_total_ms": route.wanted_total_ms,
                "degraded": 1 if route.degraded else None,  # why is told to whoever asked
            }
            lane.trace.say(**{name: value for name, value in latency.items() if value is not None})

    def _start(self, start: Start) -> None:
        self._generations.append(start())

    def _close(self) -> None:
        for generation in self._generations:
            generation.close()

    async def pump(self, emit: Emit) -> None:
        """Give every chunk to ``emit``, of several generations as they come. Raises a chunk's error."""
        if len(self._generations) == 1:
            await self._pump_one(0, emit)
            self._whole = True
            return
        failures: list[Exception] = []
        lane = current()
        if lane is not None:
            lane.pause()
        async with anyio.create_task_group() as group:

            async def pump_one(number: int) -> None:
                if lane is not None:  # they take turns
                    enter(lane.trace.lane(f"server {number}"))
                try:
                    await self._pump_one(number, emit)
                except Exception as error:
                    failures.append(error)  # raised below: the group would wrap it in an ExceptionGroup
                    group.cancel_scope.cancel()

            for number in range(len(self._generations)):
                group.start_soon(pump_one, number)
        if lane is not None:
            lane.resume()
        if failures:
            raise failures[0]
        self._whole = True

    async def finish(self, receive: Receive, emit: Emit) -> bool:
        """Start, pump and close it, for an answer that is sent as a whole. False if the client left meanwhile."""

        async def work() -> None:
            async with self:
                await self.pump(emit)

        return await while_connected(receive, work)

    async def _pump_one(self, number: int, emit: Emit) -> None:
        lane = current()
        if lane is not None:
            lane.pause()
        async for chunk in self._generations[number]:
            if lane is not None:
                lane.delivered()
            self._watched.chunk(number, chunk)
            try:
                chunk.checked()
                if chunk.finish_reason == "cancelled":
                    raise EngineStopped("the answer was cut off: the server is shutting down")
            except EdgeError as error:
                self._fails(error)
                raise
            with span("serialize"):
                await emit(number, chunk)
            if lane is not None and chunk.usage is None:  # behind the last one nobody is waited for
                lane.pause()

    def _fails(self, error: EdgeError) -> None:
        self._outcome = "failed" if status_of(error) >= 500 else "refused"

    async def opened(self) -> None:
        """Wait until it stands who answers. Raises what a request fails with of which nothing was passed on."""
        lane = current()
        if lane is not None:
            lane.pause()
        try:
            for generation in self._generations:
                await generation.opened()
        except EdgeError as error:
            self._fails(error)
            raise
        if lane is not None:
            lane.resume()

    @property
    def route(self) -> Route:
        """Of the first."""
        return self._generations[0].route

    def usage(self) -> Usage:
        """The sum over the generations, right once ``pump`` has returned."""
        usages = [generation.usage for generation in self._generations]
        return Usage(
            sum(usage.prompt_tokens for usage in usages),
            sum(usage.completion_tokens for usage in usages),
            sum(usage.cached_tokens for usage in usages),
        )


async def while_connected(receive: Receive, work: Callable[[], Awaitable[None]]) -> bool:
    """Run ``work``, cancelling it when the client leaves; False if it left. ``receive`` has given the whole body."""
    failure: list[Exception] = []
    finished = False
    async with anyio.create_task_group() as group:
        group.start_soon(partial(_cancel_on_disconnect, receive, group.cancel_scope))
        try:
            await work()
            finished = True
        except Exception as error:
            failure.append(error)  # raised below: the group would wrap it in an ExceptionGroup
        group.cancel_scope.cancel()
    if failure:
        raise failure[0]
    return finished


async def _cancel_on_disconnect(receive: Receive, scope: anyio.CancelScope) -> None:
    with suppress(EOFError):
        while (await receive())["type"] != "http.disconnect":
            pass
    scope.cancel()
