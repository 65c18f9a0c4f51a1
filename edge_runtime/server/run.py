"""Runs the application in uvicorn."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from contextlib import suppress
from types import FrameType

import anyio.to_thread
import uvicorn
from starlette.applications import Starlette
from uvicorn.config import LOGGING_CONFIG

from edge_runtime.errors import ConfigError
from edge_runtime.server.context import ServerContext
from edge_runtime.server.models import dead_models
from edge_runtime.server.protocol import PatientProtocol
from edge_runtime.server.shelf import Shelf
from edge_runtime.server.signals import once, termination_interrupts
from edge_runtime.server.supervisor import Supervisor

_log = logging.getLogger("uvicorn.error")  # uvicorn sets this one up, so that all lines look alike

GRACE_SECONDS = 10.0
"""On shutdown, answers under way get this long to finish."""
_ENDING_SECONDS = 5.0
"""And this long to say that they did not."""


def serve(
    app: Starlette, host: str = "127.0.0.1", port: int = 8000, *, allow_open: bool = False, log_level: str = "info"
) -> None:
    """Serve until SIGINT or SIGTERM, then let answers under way finish, and end those with an error that have not after
    10 s (a second SIGINT ends them at once, a second SIGTERM the process). Returns then, so that the caller can close
    the models.

    ConfigError if ``host`` is reachable from other machines while ``app`` has no API key (``allow_open`` lets it be),
    and if the address cannot be had.
    """
    listener = listen(app, host, port, allow_open=allow_open)
    # uvicorn raises the signal again once it is done
    with listener, suppress(KeyboardInterrupt), termination_interrupts():
        server = make_server(app, log_level)
        context: ServerContext = app.state.context
        for place in context.shelf.places:
            if place.model is None:
                _log.info("%s, opened on demand", place.name)
            else:
                _log.info("%s on %s, %s", place.name, place.model.placement["device"], place.model.placement["reason"])
        _log.info("serving on %s (Ctrl-C to quit)", url_of(listener))
        server.run(sockets=[listener])


class Server(uvicorn.Server):
    """Whose answers end with an error where there is no more time for them, rather than in the middle; and which tells
    the service manager how it is."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._supervising = asyncio.get_running_loop().create_task(self._supervise())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._supervising.cancel()
        Supervisor().tell("STOPPING=1")
        ending = asyncio.get_running_loop().create_task(self._end_answers())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        once(sig)
        super().handle_exit(sig, frame)

    async def _supervise(self) -> None:
        """While all is well. On the event loop: where that hangs, nothing is said either."""
        supervisor = Supervisor()
        supervisor.tell("READY=1")
        while supervisor.interval is not None:
            if not dead_models(self._shelf):
                supervisor.tell("WATCHDOG=1")
            await asyncio.sleep(supervisor.interval)

    async def _end_answers(self) -> None:
        await asyncio.sleep(GRACE_SECONDS)
        self._shelf.stop_opening()
        models = [place.model for place in self._shelf.places if place.model is not None]
        await asyncio.gather(*(anyio.to_thread.run_sync(model.close) for model in models))

    @property
    def _shelf(self) -> Shelf:
        context: ServerContext = self.config.app.state.context  # type: ignore[union-attr]  # may be a name, by its type
        return context.shelf


def listen(app: Starlette, host: str, port: int, *, allow_open: bool = False) -> socket.socket:
    """A listening socket; port 0 takes any free one. ConfigError as for :func:`serve`."""
    context: ServerContext = app.state.context
    if not context.guard.closed and not allow_open and not _is_loopback(host):
        raise ConfigError(
            f"{host} is reachable from other machines and there is no API key: set one (--api-key, or "
            "edge-glm key add), serve on 127.0.0.1, or say that anybody may ask (--allow-open)"
        )
    context.guard.loopback_only = not allow_open and _is_loopback(host)
    if not 0 <= port <= 65535:
        raise ConfigError(f"the port must be from 0 to 65535, not {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"cannot serve on {host} port {port}: {error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)  # uvicorn's own backlog; from here on clients wait instead of being refused
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot serve on {host} port {port}: {error}; choose another with --port") from error
    return listener


def url_of(listener: socket.socket) -> str:
    """Where clients reach ``listener``, the port as really taken."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def make_server(app: Starlette, log_level: str = "info") -> Server:
    """A server for ``run(sockets=[listen(…)])``. What the runtime logs looks like uvicorn's own lines."""
    loggers = {**LOGGING_CONFIG["loggers"], "edge_glm": {"handlers": ["default"], "level": log_level.upper()}}
    return Server(
        uvicorn.Config(
            app,
            log_level=log_level,
            log_config={**LOGGING_CONFIG, "loggers": loggers},
            timeout_graceful_shutdown=round(GRACE_SECONDS + _ENDING_SECONDS),
            server_header=False,
            http=PatientProtocol,
            ws="none",
            lifespan="off",
        )
    )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # another name may mean any address
