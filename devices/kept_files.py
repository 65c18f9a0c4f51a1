"""Files that are kept to save work later, in a folder of a bounded size: whole or absent, their owner's only.

Any number of processes may share the folder. The time of a file's last change says when it was last used.
"""

from __future__ import annotations

import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path

_PARTIAL = ".partial"
_STALE_S = 3600
"""Partial files this old were left by a process that was killed."""


def write_whole(path: Path, *parts: bytes) -> None:
    """Write ``parts`` under a temporary name and rename. OSError; the folder is then without a part of it."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(_PARTIAL, dir=path.parent)  # made with mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.writelines(parts)
        Path(partial).replace(path)
    except BaseException:
        with suppress(OSError):
            Path(partial).unlink()
        raise


def make_room(root: Path, suffix: str, size: int, max_bytes: int) -> bool:
    """Delete the least recently used files under ``root`` whose names end in ``suffix`` until ``size`` more bytes fit.

    False, and nothing is deleted, if they never will. OSError.
    """
    if size > max_bytes:
        return False
    files = []
    for path in root.rglob("*"):
        with suppress(OSError):  # gone since
            stat = path.stat()
            if path.suffix == suffix:
                files.append((stat.st_mtime_ns, stat.st_size, path))
            elif path.suffix == _PARTIAL and time.time() - stat.st_mtime > _STALE_S:
                path.unlink()
    total = sum(size for _, size, _ in files)
    for _, old, path in sorted(files):
        if total + size <= max_bytes:
            break
        path.unlink(missing_ok=True)
        total -= old
    return True
