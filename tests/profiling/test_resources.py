"""What the system counts of this process, provoked."""

from __future__ import annotations

import mmap
import sys
import threading
import time

import pytest

from edge_runtime.profiling.resources import Clock, MemoryTimeline, thinned

SIZE = 64 << 20


@pytest.mark.skipif(sys.platform == "win32", reason="Windows counts both sorts together")
def test_page_faults_and_switches_are_counted() -> None:
    before = Clock.read()
    with mmap.mmap(-1, SIZE) as pages:
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            pages.madvise(mmap.MADV_NOHUGEPAGE)
        for at in range(0, SIZE, mmap.PAGESIZE):
            pages[at] = 1
    thread = threading.Thread(target=lambda: [time.sleep(0.001) for _ in range(20)])  # of another thread than this one
    thread.start()
    thread.join()
    usage = Clock.read().usage("it", before)
    assert usage.name == "it"
    assert usage.minor_faults is not None
    assert usage.minor_faults >= SIZE // mmap.PAGESIZE
    assert usage.voluntary_switches is not None
    assert usage.voluntary_switches >= 20
    assert usage.involuntary_switches is not None
    assert usage.involuntary_switches >= 0
    assert usage.wall_s >= 0.02
    assert usage.other_cpu_s >= 0


def test_what_windows_counts_together_is_not_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)
    usage = Clock.read().usage("it", Clock.read())
    assert (usage.voluntary_switches, usage.involuntary_switches) == (None, None)
    assert (usage.minor_faults, usage.major_faults) == (None, None)


def test_processor_time_is_counted() -> None:
    before = Clock.read()
    while Clock.read().cpu < before.cpu + 0.05:
        pass
    usage = Clock.read().usage("it", before)
    assert usage.cpu_s == pytest.approx(0.05, abs=0.04)
    assert usage.wall_s > 0


def test_memory_along_the_way() -> None:
    with MemoryTimeline() as timeline:
        timeline.mark("before")
        taken = bytearray(b"x") * SIZE
        timeline.mark("with")
        while len(timeline.samples) < 6:  # those of the thread
            time.sleep(0.005)
        del taken
        timeline.mark("after")
    resident = dict(timeline.samples)
    (before, _), (with_it, _), (after, _) = timeline.marks
    assert resident[with_it] - resident[before] > SIZE * 0.9
    assert resident[with_it] - resident[after] > SIZE * 0.5
    count = len(timeline.samples)
    time.sleep(0.05)
    assert len(timeline.samples) == count  # it has ended


def test_thinned_samples_keep_peaks() -> None:
    samples = [(float(at), at % 10) for at in range(100)]
    samples[37] = (37.0, 99)
    found = thinned(samples[::-1], 10)
    assert len(found) == 10
    assert (37.0, 99) in found
    assert found == sorted(found)
    assert thinned(samples[:3], 10) == samples[:3]
