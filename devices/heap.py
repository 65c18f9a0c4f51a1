"""How the C library keeps memory that it hands out."""

from __future__ import annotations

import ctypes
import sys

_M_MMAP_THRESHOLD = -3
_LARGE = 1 << 20


def map_large_blocks() -> None:
    """From now on blocks of 1 MiB or more are mapped one by one, and go back to the system when they are freed (glibc;
    elsewhere nothing happens).

    By itself glibc puts ever larger ones into its heap, where those that an engine replaces by larger ones, as it meets
    longer steps, leave holes: 60 MiB on OpenVINO with SmolLM2 after 16 prompts of 448 tokens. No step took more time.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, _LARGE)
