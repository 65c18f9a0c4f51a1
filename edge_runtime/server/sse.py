"""Server-sent events, as OpenAI's streams use them: ``data: <json>`` and a blank line, ``data: [DONE]`` at the end."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from starlette.types import Receive, Scope, Send

from edge_runtime.server.errors import Failure, failure_of
from edge_runtime.server.running import Running, while_connected
from edge_runtime.server.tracing import timing_comment

_HEADERS = [
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold the tokens back
]

Write = Callable[[bytes], Awaitable[None]]
Produce = Callable[[Running, Write], Awaitable[None]]
"""Writes a request's events; what it raises becomes an error event."""


def event(payload: Any) -> bytes:
    """One event with ``payload`` as JSON (no newline can be in it)."""
    return b"data: " + msgspec.json.encode(payload) + b"\n\n"


DONE = b"data: [DONE]\n\n"


class EventStream:
    """An ASGI response that streams what ``produce`` writes, and ends the generations when the client leaves.

    Until it stands who answers, an error is an HTTP status; from then on an event of its own, without the end.
    """

    def __init__(
        self,
        running: Running,
        produce: Produce,
        end: bytes = DONE,
        failed: Callable[[Failure], bytes] = lambda failure: event(failure.body()),
        media_type: str = "text/event-stream; charset=utf-8",
    ) -> None:
        """``end``: what comes last. ``failed``: the event of a failure after something was sent."""
        self._running = running
        self._produce = produce
        self._end = end
        self._failed = failed
        self._events = media_type.startswith("text/event-stream")
        self._headers = [(b"content-type", media_type.encode()), *_HEADERS]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def write(data: bytes) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": True})

        async def work() -> None:
            await self._running.opened()
            route = [(name.encode(), value.encode()) for name, value in self._running.route.headers().items()]
            await send({"type": "http.response.start", "status": 200, "headers": [*self._headers, *route]})
            try:
                await self._produce(self._running, write)
                await write((timing_comment(scope) if self._events else b"") + self._end)
            except Exception as error:
                await write(self._failed(failure_of(error)))

        try:
            if await while_connected(receive, work):
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await self._running.__aexit__()
