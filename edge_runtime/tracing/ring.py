"""The newest requests' traces, and the spans of the newest of them."""

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
        """Of the newest ``traces`` sums are kept, and single spans of as many of them as have ``spans`` in all."""
        self._most_spans, self._most_traces = spans, traces
        self._lock = threading.Lock()
        self._kept: deque[Trace] = deque(maxlen=traces)
        self._whole: deque[tuple[Trace, int]] = deque()
        """Those with their spans, and how many count: some may still come."""
        self._spans = 0

    def add(self, trace: Trace) -> None:
        """One that has ended; the oldest give way."""
        with self._lock:
            self._kept.append(trace)
            self._whole.append((trace, len(trace)))
            self._spans += self._whole[-1][1]
            whole = self._whole
            while len(whole) > self._most_traces or (self._spans > self._most_spans and len(whole) > 1):
                oldest, spans = whole.popleft()
                oldest.thin()
                self._spans -= spans

    def newest(self, count: int) -> list[Trace]:
        """The newest first."""
        with self._lock:
            return list(islice(reversed(self._kept), count))
