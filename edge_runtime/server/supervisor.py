"""What the service manager is told: systemd's notification protocol (sd_notify(3)), where it asks for that."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from contextlib import suppress


class Supervisor:
    """Of this process; silent where nobody supervises it. Notifications are never waited for, and may be lost."""

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        environ = os.environ if environ is None else environ
        address = environ.get("NOTIFY_SOCKET", "")
        self._address = f"\0{address[1:]}" if address.startswith("@") else address  # "@": the abstract namespace
        if not hasattr(socket, "AF_UNIX"):
            self._address = ""
        self.interval = (_watchdog_s(environ) / 2 if self._address else 0) or None
        """Seconds after which it wants to hear that all is well, with a margin; None: it does not."""

    def tell(self, *words: str) -> None:
        """Such as ``READY=1``."""
        if not self._address:
            return
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifier:
            notifier.setblocking(False)
            notifier.sendto("\n".join(words).encode(), self._address)


def _watchdog_s(environ: Mapping[str, str]) -> float:
    """0: there is none, or it is not for this process."""
    if environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return 0.0
    try:
        return max(int(environ.get("WATCHDOG_USEC", "0")), 0) / 1e6
    except ValueError:
        return 0.0
