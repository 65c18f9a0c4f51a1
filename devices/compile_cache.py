"""Compiled models on disk, for devices that take minutes to compile one.

A blob is named by a hash over everything that decides what it is. It is checked before an engine sees it: engines
trust what they import. A cache never fails a load: what cannot be read or imported is deleted and compiled anew, and
what cannot be written is only said in the log.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from devices.errors import EngineError
from devices.kept_files import make_room, write_whole

MAX_BYTES = 4 << 30
"""Of all blobs in a folder."""
_SUFFIX = ".blob"
_MAGIC = b"edge-glm compiled model, 1".ljust(32)
_HEAD_BYTES = len(_MAGIC) + 32
"""Then the blob's SHA-256. As many bytes as an engine may want it to be aligned to."""

_log = logging.getLogger("edge_glm.compiled")
Compiled = TypeVar("Compiled")


class CompileCache:
    """Blobs in ``folder``, at most ``max_bytes``; the least recently used go first. Safe between processes."""

    def __init__(self, folder: Path, max_bytes: int = MAX_BYTES) -> None:
        self._folder = folder
        self._max_bytes = max_bytes

    def open(
        self,
        key: str,
        take: Callable[[NDArray[np.uint8]], Compiled],
        make: Callable[[], Compiled],
        dump: Callable[[Compiled], bytes],
    ) -> Compiled:
        """What ``take`` imports from the blob of ``key``; if there is none that it takes, what ``make`` compiles.

        The blob is the mapped file, (bytes,); what is written to it stays in memory. ``dump`` gives one of what was
        compiled. EngineError from ``take`` and ``dump`` goes to the log, from ``make`` to the caller.
        """
        blob = self._load(key)
        if blob is not None:
            try:
                return take(blob)
            except EngineError as error:
                _log.warning("compiled model %s cannot be used and is compiled anew: %s", self._path(key), error)
        compiled = make()
        try:
            self._save(key, dump(compiled))
        except (EngineError, OSError) as error:
            _log.warning("the compiled model is not kept in %s: %s", self._folder, error)
        return compiled

    def _load(self, key: str) -> NDArray[np.uint8] | None:
        """The blob; None if it is not there or not as it was written."""
        path = self._path(key)
        try:
            os.utime(path)
            data = np.memmap(path, np.uint8, "c")  # engines want to be able to write
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:  # ValueError: an empty file
            _log.warning("compiled model %s cannot be read and is compiled anew: %s", path, error)
            return None
        head, blob = data[:_HEAD_BYTES].tobytes(), data[_HEAD_BYTES:]
        if head != _MAGIC + hashlib.sha256(blob.data).digest():
            _log.warning("compiled model %s is damaged and is compiled anew", path)
            return None
        return blob

    def _save(self, key: str, blob: bytes) -> None:
        with suppress(FileNotFoundError):
            self._path(key).unlink()  # one that was of no use
        size = _HEAD_BYTES + len(blob)
        if not make_room(self._folder, _SUFFIX, size, self._max_bytes):
            raise OSError(f"its {size} bytes are more than the {self._max_bytes} that the cache may have")
        write_whole(self._path(key), _MAGIC, hashlib.sha256(blob).digest(), blob)

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}{_SUFFIX}"


def cache_key(model: Path, properties: Mapping[str, str], made_by: Mapping[str, str]) -> str:
    """A name for ``model`` (with its weights beside it, ``.bin``) compiled with ``properties`` by ``made_by``.

    ``made_by``: the hardware, and versions of all that has a part in it. The graph counts by its content, the weights,
    which are too large to be read for this, by place, size and time. OSError if a file is not there.
    """
    weights = model.with_suffix(".bin").resolve()
    stat = weights.stat()
    parts = (
        hashlib.sha256(model.read_bytes()).hexdigest(),
        (str(weights), stat.st_size, stat.st_mtime_ns),
        sorted(properties.items()),
        sorted(made_by.items()),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()
