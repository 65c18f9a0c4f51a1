"""What the system counts of this process: processor time, context switches, page faults; and memory along the way."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import NamedTuple

import psutil

from edge_runtime.profiling.result import Usage

SAMPLE_S = 0.02


class Clock(NamedTuple):
    """Counted until now. None: this platform does not tell."""

    wall: float
    cpu: float
    all_cpu: float
    """Of the whole machine."""
    voluntary: int | None
    involuntary: int | None
    minor: int | None
    major: int | None

    @classmethod
    def read(cls) -> Clock:
        times = psutil.Process().cpu_times()
        return cls(time.perf_counter(), times.user + times.system, _busy(), *_counts())

    def usage(self, name: str, since: Clock) -> Usage:
        """What was done since then is called ``name``."""
        cpu = self.cpu - since.cpu
        return Usage(
            name,
            self.wall - since.wall,
            cpu,
            max(self.all_cpu - since.all_cpu - cpu, 0.0),
            _less(self.voluntary, since.voluntary),
            _less(self.involuntary, since.involuntary),
            _less(self.minor, since.minor),
            _less(self.major, since.major),
        )


def _busy() -> float:
    """Seconds that all processors together have worked."""
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    guests = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # counted as user, too
    stolen = getattr(times, "steal", 0.0)  # other virtual machines'
    return float(sum(times) - idle - guests - stolen)


def _counts() -> tuple[int | None, int | None, int | None, int | None]:
    """Voluntary and involuntary context switches, minor and major faults. Of all threads: on Linux psutil tells the
    switches of the first one only."""
    try:
        import resource
    except ImportError:  # Windows counts both sorts together
        return None, None, None, None
    found = resource.getrusage(resource.RUSAGE_SELF)
    return found.ru_nvcsw, found.ru_nivcsw, found.ru_minflt, found.ru_majflt


def _less(now: int | None, before: int | None) -> int | None:
    return None if now is None or before is None else now - before


class MemoryTimeline:
    """A context manager in which a thread notes every :data:`SAMPLE_S` what is resident."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, int]] = []
        """(seconds since it was made, bytes)."""
        self.marks: list[tuple[float, str]] = []
        self._process = psutil.Process()
        self._started = time.perf_counter()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="edge-glm memory", daemon=True)

    def mark(self, name: str) -> None:
        """``name`` begins now."""
        self.marks.append((self._sample(), name))

    def _watch(self) -> None:
        while not self._over.wait(SAMPLE_S):
            self._sample()

    def _sample(self) -> float:
        resident = int(self._process.memory_info().rss)
        at = time.perf_counter() - self._started
        self.samples.append((at, resident))
        return at

    def __enter__(self) -> MemoryTimeline:
        self._sample()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        self._sample()


def thinned(samples: list[tuple[float, int]], most: int) -> list[tuple[float, int]]:
    """In order of time, of each of ``most`` stretches the largest: peaks stay."""
    ordered = sorted(samples)
    size = -(-len(ordered) // most)
    return [max(ordered[at : at + size], key=lambda each: each[1]) for at in range(0, len(ordered), size)]
