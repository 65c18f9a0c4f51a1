"""A control group (container, service) whose memory limit shrinks while a model is open.

The limit is read anew every few seconds. Below what it was at first the KV cache may grow only into what is free, so
that requests wait; where little is, prefixes give way at once. An idle model whose weights may be chosen goes to a
smaller variant. Where the limit is lifted, all is as before.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

from devices.host import Memory, host_memory
from edge_runtime.budgets import DEFAULT_SHARE
from edge_runtime.engine import Engine
from edge_runtime.heartbeat import HEARTBEAT, Heartbeat
from edge_runtime.memory import format_bytes

BEATS = 2
"""From one look to the next: each takes a tenth of a millisecond."""
SHORT = 0.05
"""Of the limit: where less is free, no prefix is worth its memory."""
USABLE = 0.9
"""Of the limit: what a smaller variant is chosen for; the rest is for the system's own."""
_log = logging.getLogger("edge_glm.memory")


class MemoryWatch:
    """Of one model."""

    def __init__(
        self,
        engines: Callable[[], Sequence[Engine]],
        relieve: Callable[[int | None], bool],
        measure: Callable[[], Memory] = host_memory,
        heartbeat: Heartbeat = HEARTBEAT,
    ) -> None:
        """``engines``: those in use whose KV cache is in this memory. ``relieve``, on a thread of its own: to make do
        with so many bytes for the whole process, None: as at first; False: not now."""
        self._engines = engines
        self._relieve = relieve
        self._measure = measure
        self._at_first = self._limit = measure().total
        self._beats = 0
        self._relieved = self._limit
        """The limit that was made do with."""
        self._relieving: threading.Thread | None = None
        self.told: str | None = None
        """What is tight, in words; None: nothing."""
        self._leave = heartbeat.call(self._beat)

    def close(self) -> None:
        self._leave()

    def _beat(self) -> None:
        self._beats += 1
        if self._beats % BEATS == 0:
            self.look()

    def look(self) -> None:
        """Once."""
        memory = self._measure()
        shrunk = memory.total < self._at_first
        if memory.total != self._limit:
            self._limit = memory.total
            self._share_out(memory, shrunk, anew=True)
        elif shrunk:
            self._share_out(memory, shrunk, anew=False)
        if self._relieved != self._limit and (self._relieving is None or not self._relieving.is_alive()):
            within = int(memory.total * USABLE) if shrunk else None
            self._relieving = threading.Thread(
                target=self._have_relieved, args=(self._limit, within), name="edge-glm memory", daemon=True
            )
            self._relieving.start()

    def _share_out(self, memory: Memory, shrunk: bool, anew: bool) -> None:
        """``anew``: the limit is another one. Under the same one the KV cache may get more, but never less: blocks that
        were given back are there to be used again, whether or not the system has got them."""
        engines = self._engines()
        if not shrunk:
            _log.info("the memory limit is %s again", format_bytes(memory.total))
            self.told = None
            for engine in engines:
                engine.limit_kv(None)
            return
        free, short = int(memory.free * DEFAULT_SHARE) // max(len(engines), 1), memory.free < memory.total * SHORT
        left = 0
        for engine in engines:
            nbytes = engine.kv_bytes_used + free
            if not anew and engine.kv_limit is not None:
                nbytes = max(nbytes, engine.kv_limit)
            engine.limit_kv(nbytes, 0 if short else nbytes)
            left += nbytes
        self.told = f"the memory limit has shrunk from {format_bytes(self._at_first)} to {format_bytes(memory.total)}"
        if engines:
            self.told += f": {format_bytes(left)} are left for the KV cache"
            self.told += ", and no prefixes are kept" if short else ""
        if anew:
            _log.warning("%s", self.told)

    def _have_relieved(self, limit: int, within: int | None) -> None:
        try:
            done = self._relieve(within)
        except Exception:  # it would not end otherwise at the next look
            _log.exception("a smaller variant could not be taken")
            done = True
        if done:
            self._relieved = limit
