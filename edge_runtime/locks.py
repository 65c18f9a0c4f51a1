"""A lock between processes, on a file that exists only while someone holds or awaits it."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edge_runtime.disk import why
from edge_runtime.errors import StorageError

_POLL_S = 0.05
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
"""In a folder that others may write to, one of them could have laid a link there to a file of the user's."""


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold the lock at ``path``, waiting for as long as another process (or thread) holds it.

    The system releases it when the holder dies. Raises StorageError if the file cannot be made or
    locked.
    """
    handle = _acquire(path)
    try:
        yield
    finally:
        with suppress(OSError):  # Windows keeps open files; the next holder uses it again
            path.unlink()
        os.close(handle)


class HeldLock:
    """A lock that somebody holds for as long as they live; the system releases it when they die."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle: int | None = None
        self._mutex = threading.Lock()
        self._released = False

    def try_acquire(self) -> bool:
        """False: another process (or thread) holds it, or it was released. StorageError if the file cannot be made or
        locked."""
        with self._mutex:
            if self._handle is None and not self._released:
                self._handle = _try_acquire(self._path)
            return self._handle is not None

    def release(self) -> None:
        """For good: an attempt that is still under way in another thread gets nothing any more. Idempotent."""
        with self._mutex:
            self._released = True
            handle, self._handle = self._handle, None
            if handle is not None:
                with suppress(OSError):
                    self._path.unlink()
                os.close(handle)


def _acquire(path: Path) -> int:
    while (handle := _try_acquire(path)) is None:
        time.sleep(_POLL_S)
    return handle


def _try_acquire(path: Path) -> int | None:
    """None: somebody else holds it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | _NO_LINK, 0o644)
    except OSError as error:
        raise StorageError(f"cannot make the lock file {path}: {why(error)}") from error
    try:
        # The holder before us deletes the file; a lock on a deleted file excludes nobody.
        if _try_lock(handle) and _is_current(handle, path):
            return handle
    except OSError as error:  # such as a network's file system without locks
        os.close(handle)
        raise StorageError(f"cannot lock {path}: {why(error)}") from error
    except BaseException:
        os.close(handle)
        raise
    os.close(handle)
    return None


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
