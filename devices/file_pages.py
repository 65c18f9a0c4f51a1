"""Giving back the pages of model files that loading has read.

Both engines map the weights and make packed copies of most of them; the mapped originals stay resident though they are
hardly looked at again. Dropping them loses nothing: what is needed is read again from the file, or from the system's
cache of it.
"""

from __future__ import annotations

import ctypes
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_MADV_DONTNEED = 4  # Linux; mmap.MADV_DONTNEED is for mappings that Python has made
_MAPPING = re.compile(rb"(?m)^([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ \S+ \d+ *(.*)\n")
_WRITTEN = re.compile(rb"(?m)^Anonymous: *(\d+) kB")
_EVERY_S = 0.05
"""So long what was read may stay: 20 ms instead lower the peak by a hundredth more."""


def release_file_pages(folder: Path) -> None:
    """Drop the resident pages of all files under ``folder`` that this process has mapped and not written to.

    Nobody may unmap one of them meanwhile. Elsewhere than on Linux it does nothing.
    """
    madvise = _madvise()
    if madvise is None:
        return
    for mapping, text in _mappings("smaps", folder):
        written = _WRITTEN.search(text, mapping.end())
        if written is not None and int(written[1]) == 0:
            start, end = int(mapping[1], 16), int(mapping[2], 16)
            madvise(start, end - start, _MADV_DONTNEED)


@contextmanager
def releasing_file_pages(folder: Path) -> Iterator[None]:
    """Drop, all the while, what is resident of the files under ``folder`` that are mapped for reading only when it
    begins, so that an engine which packs its weights one after another does not hold them twice.

    Only for mappings that stay until the end: the addresses of one that is unmapped may become somebody else's.
    """
    madvise = _madvise()
    places = [] if madvise is None else [each for each, _ in _mappings("maps", folder) if b"w" not in each[3]]
    ranges = [(int(each[1], 16), int(each[2], 16)) for each in places]
    if madvise is None or not ranges:
        yield
        return
    done = threading.Event()

    def release() -> None:
        for start, end in ranges:
            madvise(start, end - start, _MADV_DONTNEED)

    def run() -> None:
        while not done.wait(_EVERY_S):
            release()

    thread = threading.Thread(target=run, name="edge-glm file pages", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        release()


def _madvise() -> Callable[[int, int, int], int] | None:
    """The system's; None where it does not forget pages, or there is no /proc to learn of them."""
    if sys.platform != "linux" or not Path("/proc/self/smaps").exists():
        return None
    function = getattr(ctypes.CDLL(None), "madvise", None)
    if function is None:
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    madvise: Callable[[int, int, int], int] = function
    return madvise


def _mappings(table: str, folder: Path) -> Iterator[tuple[re.Match[bytes], bytes]]:
    """Those of files under ``folder`` in /proc/self/``table``: start, end, permissions, path; and the whole text."""
    try:
        text = Path(f"/proc/self/{table}").read_bytes()
    except OSError:  # not allowed in a sandbox
        return
    prefix = bytes(folder.resolve()) + b"/"
    for mapping in _MAPPING.finditer(text):
        if mapping[4].startswith(prefix):
            yield mapping, text
