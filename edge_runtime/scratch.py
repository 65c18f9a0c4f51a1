"""Temporary folders that do not outlive their process for long, however it ends."""

from __future__ import annotations

import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edge_runtime.errors import StorageError
from edge_runtime.locks import HeldLock, file_lock
from edge_runtime.package import storage_errors

_LOCK = ".lock"


@contextmanager
def scratch_folder(prefix: str, parent: Path | None = None) -> Iterator[Path]:
    """A new empty folder whose name begins with ``prefix``, removed at the end.

    Those of the same ``prefix`` that killed processes left are removed as well: a lock beside each tells whether its
    process lives. ``parent`` None: the system's temporary folder. StorageError if it cannot be made.
    """
    told = f"cannot make a temporary folder in {parent or 'any of the usual places'}"
    with storage_errors(told):
        folder = (Path(tempfile.gettempdir()) if parent is None else parent) / f"{prefix}{uuid.uuid4().hex}"
        _remove_dead(folder.parent, prefix)
    with file_lock(_lock_of(folder)):  # before there is a folder to be taken for a dead one
        try:
            with storage_errors(told):
                folder.mkdir(mode=0o700)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _lock_of(folder: Path) -> Path:
    return folder.with_name(folder.name + _LOCK)


def _remove_dead(parent: Path, prefix: str) -> None:
    names = {path.name.removesuffix(_LOCK) for path in parent.glob(f"{prefix}*")}
    for name in sorted(names):
        if not re.fullmatch(re.escape(prefix) + "[0-9a-f]{32}", name):
            continue  # somebody else's, whose name begins alike
        lock = HeldLock(_lock_of(parent / name))
        with suppress(StorageError):  # another user's
            if lock.try_acquire():
                shutil.rmtree(parent / name, ignore_errors=True)
                lock.release()
