"""The thread on which everything runs that waits for other machines, and whether there is a way to them."""

from __future__ import annotations

import asyncio
import ipaddress
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from edge_runtime.errors import EngineStopped

KNOWN_S = 2.0
"""For so long it is remembered whether there is a network."""


class NetworkThread:
    """An event loop on a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._last: Callable[[], Coroutine[Any, Any, None]] | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="edge-glm tiers", daemon=True)
        self._thread.start()

    def close(self, last: Callable[[], Coroutine[Any, Any, None]] | None = None) -> None:
        """Cancel all that runs, wait for it, run ``last`` and end. Idempotent."""
        if not self._closing:
            self._closing, self._last = True, last
            self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_forever()
            while running := asyncio.all_tasks(self.loop):
                for task in running:
                    task.cancel()
                self.loop.run_until_complete(asyncio.wait(running, timeout=1.0))
            if self._last is not None:
                self.loop.run_until_complete(self._last())
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
            self.loop.run_until_complete(self.loop.shutdown_default_executor())
        finally:
            self.loop.close()


class Canceller:
    """A coroutine on another thread's event loop that can be ended from anywhere, without locks."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._task: asyncio.Task[None] | None = None

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """EngineStopped if the loop is closed."""

        def begin() -> None:
            self._task = self._loop.create_task(work)

        try:
            self._loop.call_soon_threadsafe(begin)
        except RuntimeError as error:
            work.close()
            raise EngineStopped("the model has been closed") from error

    def cancel(self) -> None:
        with suppress(RuntimeError):  # the loop is closed, and all its tasks are over
            self._loop.call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()


class Reach:
    """Whether other machines can be reached: not with ``offline``, nor where no network interface is up.

    Names of this machine can always be reached. Asking takes microseconds, and a few milliseconds every other second.
    """

    def __init__(
        self,
        offline: bool = False,
        interfaces: Callable[[], bool] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.offline = offline
        self._interfaces = interfaces or _some_interface_is_up
        self._clock = clock
        self._known: tuple[float, bool] | None = None

    def refusal(self, url: str) -> str | None:
        """Why ``url`` cannot be reached; None: it may be."""
        if self.offline:
            return "offline mode is on"
        if is_loopback(urlsplit(url).hostname or "") or self._up():
            return None
        return "there is no network"

    def _up(self) -> bool:
        now = self._clock()
        if self._known is None or now - self._known[0] >= KNOWN_S:
            self._known = (now, self._interfaces())
        return self._known[1]


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _some_interface_is_up() -> bool:
    """Other than the loopback, with an address that is not link-local."""
    import socket

    import psutil

    addresses = psutil.net_if_addrs()
    for name, state in psutil.net_if_stats().items():
        if state.isup and any(
            each.family in (socket.AF_INET, socket.AF_INET6) and _routable(each.address)
            for each in addresses.get(name, ())
        ):
            return True
    return False


def _routable(address: str) -> bool:
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    return not (ip.is_loopback or ip.is_link_local)
