"""What killed pulls, exports and removals leave beside the models: hidden folders, and the locks that guard them."""

from __future__ import annotations

import re
import shutil
from contextlib import suppress
from pathlib import Path

from edge_runtime.errors import StorageError
from edge_runtime.locks import HeldLock

_FOLDER = re.compile(r"(\..+)\.(fetch|partial)-\w+")
_LOCKS = {"fetch": ".pull.lock", "partial": ".lock"}
"""Of whoever works in such a folder: a pull, and :func:`edge_runtime.package_writer.write_package` or a removal."""


def remove_leftovers(models: Path) -> None:
    """Whatever nobody holds the lock of. On a disk that is read-only they stay."""
    for path in sorted(models.glob(".*")):
        match = _FOLDER.fullmatch(path.name)
        if match is None and path.suffix != ".lock":
            continue
        lock = HeldLock(path if match is None else models / (match[1] + _LOCKS[match[2]]))
        with suppress(StorageError):
            if lock.try_acquire():
                if match is not None:
                    shutil.rmtree(path, ignore_errors=True)
                lock.release()
