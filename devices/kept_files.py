"""Files that are kept to save work later, in a folder of a bounded size: whole or absent, their owner's only.

Any number of processes may share the folder. The time of a file's last change says when it was last used.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

_PARTIAL = ".partial"


def write_whole(path: Path, *parts: bytes) -> None:
    """Write ``parts`` under a temporary name and rename. OSError; the folder is then without a part of it."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, partial = _begin(path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.writelines(parts)
            file.flush()
            if sys.platform != "win32":  # while it is open, it is locked, and nobody takes it for a dead process's
                partial.replace(path)
        if sys.platform == "win32":  # open files have no other name there
            partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
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
            elif path.suffix == _PARTIAL:
                _remove_dead(path)
    total = sum(size for _, size, _ in files)
    for _, old, path in sorted(files):
        if total + size <= max_bytes:
            break
        path.unlink(missing_ok=True)
        total -= old
    return True


if sys.platform == "win32":
    _STALE_S = 3600

    def _begin(folder: Path) -> tuple[int, Path]:
        """An open file, and its name."""
        handle, partial = tempfile.mkstemp(_PARTIAL, dir=folder)
        return handle, Path(partial)

    def _remove_dead(partial: Path) -> None:
        """Unless it may still be written."""
        if time.time() - partial.stat().st_mtime > _STALE_S:
            partial.unlink()
else:
    import fcntl

    def _begin(folder: Path) -> tuple[int, Path]:
        """An open file, locked for as long as it is open, and its name."""
        while True:
            handle, partial = tempfile.mkstemp(_PARTIAL, dir=folder)  # made with mode 0600
            with suppress(OSError):  # a disk without locks
                fcntl.flock(handle, fcntl.LOCK_EX)
            if os.fstat(handle).st_nlink:  # nobody has removed it between the two
                return handle, Path(partial)
            os.close(handle)

    def _remove_dead(partial: Path) -> None:
        """Unless the process that writes it lives."""
        handle = os.open(partial, os.O_RDWR)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            partial.unlink()
        finally:
            os.close(handle)
