"""uvicorn's HTTP protocol, with an end to how long it waits for the head of a request, and OpenAI's error body for what
is no HTTP."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
import msgspec
from uvicorn.protocols.http.h11_impl import H11Protocol

from edge_runtime.server.errors import Failure

HEAD_SECONDS = 20.0
"""From the opening of a connection to the last line of its first request's head. (Between requests uvicorn has a limit
of its own.) A client that sends a byte now and then, to hold as many connections as it can, is gone after that."""
_NO_HTTP = Failure(400, "this is no request as HTTP/1.1 has them, or its head is too long", "invalid_request_error")


class PatientProtocol(H11Protocol):
    """Patient, but not for ever."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._late: asyncio.TimerHandle | None = self.loop.call_later(HEAD_SECONDS, self._give_up)

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None:
            self._punctual()

    def send_400_response(self, msg: str) -> None:
        """uvicorn's own says the same in plain text, which clients of this API cannot read."""
        asked_for_head = False
        if self.cycle is not None and not self.cycle.response_complete:  # it is the body that is no HTTP
            asked_for_head = self.cycle.scope["method"] == "HEAD"
            self.cycle.disconnected = True  # whoever answers the head need not go on
            self.cycle.message_event.set()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # the answer is under way or sent
            self.transport.close()
            return
        body = msgspec.json.encode(_NO_HTTP.body())
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        for event in (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=b"" if asked_for_head else body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event))
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._punctual()
        super().connection_lost(exc)

    def _punctual(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _give_up(self) -> None:
        self._late = None
        if self.cycle is None and not self.transport.is_closing():
            self.transport.close()
