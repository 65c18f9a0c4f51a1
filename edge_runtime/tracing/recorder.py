"""What is done with traces that have ended: the newest are kept, and whoever wants them gets them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from edge_runtime.tracing.ring import Ring
from edge_runtime.tracing.trace import Trace

_log = logging.getLogger("edge_glm.tracing")
Sink = Callable[[Trace], None]
"""Must not block."""


class Recorder:
    """Any thread may use it."""

    def __init__(self, sinks: Sequence[Sink] = (), ring: Ring | None = None) -> None:
        self.ring = Ring() if ring is None else ring
        self._sinks = list(sinks)

    def add(self, sink: Sink) -> None:
        """One more."""
        self._sinks.append(sink)

    def keep(self, trace: Trace) -> None:
        """One that has ended. A sink that fails is left out from then on, and the log says so."""
        self.ring.add(trace)
        for sink in list(self._sinks):
            try:
                sink(trace)
            except Exception:
                _log.exception("traces are not passed on any more")
                self._sinks.remove(sink)
