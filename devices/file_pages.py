"""Giving back the pages of model files that loading has read.

Both engines map the weights and make packed copies of most of them; the mapped originals stay resident though they are
hardly looked at again. Dropping them loses nothing: what is needed is read again from the file, or from the system's
cache of it.
"""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path

_MADV_DONTNEED = 4  # Linux; mmap.MADV_DONTNEED is for mappings that Python has made
_MAPPING = re.compile(rb"(?m)^([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \d+ *(.*)\n")
_WRITTEN = re.compile(rb"(?m)^Anonymous: *(\d+) kB")


def release_file_pages(folder: Path) -> None:
    """Drop the resident pages of all files under ``folder`` that this process has mapped and not written to.

    Elsewhere than on Linux it does nothing.
    """
    if sys.platform != "linux":
        return
    try:
        text = Path("/proc/self/smaps").read_bytes()
        madvise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):  # no /proc in a sandbox, or another C library
        return
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    prefix = bytes(folder.resolve()) + b"/"
    for mapping in _MAPPING.finditer(text):
        if mapping[3].startswith(prefix):
            written = _WRITTEN.search(text, mapping.end())
            if written is not None and int(written[1]) == 0:
                start, end = int(mapping[1], 16), int(mapping[2], 16)
                madvise(start, end - start, _MADV_DONTNEED)
