"""What the C library's heap keeps of memory that nobody uses any more."""

from __future__ import annotations

import ctypes
import sys


def return_free_heap() -> None:
    """Give freed memory back to the system, where the C library would keep it (glibc); elsewhere nothing happens.

    Reading a tokenizer of 49,000 tokens leaves 30 MB behind, in pieces too small for the library to notice.
    """
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
    if trim is not None:
        trim(0)
