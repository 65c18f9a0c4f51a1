"""Anonymous memory as large as it may ever be needed, of which only the pages exist that were written to."""

from __future__ import annotations

import mmap
import sys

_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
"""Python names it from 3.13 on. Without it Linux refuses mappings larger than the machine's memory."""


def lazy_memory(size: int) -> mmap.mmap:
    """``size`` bytes, zero until written. OSError, OverflowError or ValueError if the address space cannot be had."""
    if sys.platform == "win32":
        return mmap.mmap(-1, size)
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)


def release_pages(memory: mmap.mmap, start: int, stop: int) -> None:
    """Give back to the system the whole pages within bytes ``start .. stop − 1``, where it takes them; they are zero
    when they are touched again."""
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    last = stop if stop == len(memory) else stop // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first and hasattr(mmap, "MADV_DONTNEED"):
        memory.madvise(mmap.MADV_DONTNEED, first, last - first)


def small_pages(size: int) -> mmap.mmap:
    """The same, never given in huge pages: where pieces far apart grow at once, each would take 2 MiB."""
    memory = lazy_memory(size)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        try:
            memory.madvise(mmap.MADV_NOHUGEPAGE)
        except OSError:  # a kernel without huge pages has nothing to switch off
            return memory
    return memory
