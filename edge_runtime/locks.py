"""A lock between processes, on a file that exists only while someone holds or awaits it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edge_runtime.errors import StorageError

_POLL_S = 0.05


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold the lock at ``path``, waiting for as long as another process (or thread) holds it.

    The system releases it when the holder dies. Raises StorageError if the file cannot be made.
    """
    handle = _acquire(path)
    try:
        yield
    finally:
        with suppress(OSError):  # Windows keeps open files; the next holder uses it again
            path.unlink()
        os.close(handle)


def _acquire(path: Path) -> int:
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise StorageError(f"cannot make the lock file {path}: {error.strerror or error}") from error
        try:
            # The holder before us deletes the file; a lock on a deleted file excludes nobody.
            if _try_lock(handle) and _is_current(handle, path):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
        time.sleep(_POLL_S)


def _is_current(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


if sys.platform == "win32":
    import msvcrt

    def _try_lock(handle: int) -> bool:
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
else:
    import fcntl

    def _try_lock(handle: int) -> bool:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
