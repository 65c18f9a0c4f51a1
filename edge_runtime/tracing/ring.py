"""The newest requests' traces, as long as they are few."""

from __future__ import annotations

import threading
from collections import deque
from itertools import islice

from edge_runtime.tracing.trace import Trace

MOST_SPANS = 100_000
"""In all, 32 bytes each."""
MOST_TRACES = 1_000


class Ring:
    """Any thread may add and read."""

    def __init__(self, spans: int = MOST_SPANS, traces: int = MOST_TRACES) -> None:
        self._most_spans = spans
        self._most_traces = traces
        self._lock = threading.Lock()
        self._kept: deque[tuple[Trace, int]] = deque()
        """With how many of its spans count: some may still come."""
        self._spans = 0

    def add(self, trace: Trace) -> None:
        """One that has ended; the oldest give way."""
        with self._lock:
            self._kept.append((trace, len(trace)))
            self._spans += self._kept[-1][1]
            while len(self._kept) > self._most_traces or (self._spans > self._most_spans and len(self._kept) > 1):
                self._spans -= self._kept.popleft()[1]

    def newest(self, count: int) -> list[Trace]:
        """The newest first."""
        with self._lock:
            return [trace for trace, _ in islice(reversed(self._kept), count)]
