"""uvicorn's HTTP protocol, which waits for the head of a request without end, with an end to it."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 20.0
"""From the opening of a connection to the last line of its first request's head. (Between requests uvicorn has a limit
of its own.) A client that sends a byte now and then, to hold as many connections as it can, is gone after that."""


class PatientProtocol(H11Protocol):
    """Patient, but not for ever."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._late: asyncio.TimerHandle | None = self.loop.call_later(HEAD_SECONDS, self._give_up)

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None:
            self._punctual()

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
