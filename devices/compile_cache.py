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

from devices.errors import EngineError
from devices.kept_files import make_room, write_whole

MAX_BYTES = 2 << 30
"""Of all blobs in a folder."""
_SUFFIX = ".blob"
_MAGIC = b"edge-glm compiled model 1\n"
_DIGEST_BYTES = 32

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
        take: Callable[[bytes], Compiled],
        make: Callable[[], Compiled],
        dump: Callable[[Compiled], bytes],
    ) -> Compiled:
        """What ``take`` imports from the blob of ``key``; if there is none that it takes, what ``make`` compiles.

        ``dump`` gives a blob of the latter. EngineError from ``take`` and ``dump`` goes to the log, from ``make`` to
        the caller.
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

    def _load(self, key: str) -> bytes | None:
        """The blob; None if it is not there or not as it was written."""
        path = self._path(key)
        try:
            data = path.read_bytes()
            os.utime(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            _log.warning("compiled model %s cannot be read and is compiled anew: %s", path, error)
            return None
        head, digest = data[: len(_MAGIC)], data[len(_MAGIC) : len(_MAGIC) + _DIGEST_BYTES]
        blob = data[len(_MAGIC) + _DIGEST_BYTES :]
        if head != _MAGIC or hashlib.sha256(blob).digest() != digest:
            _log.warning("compiled model %s is damaged and is compiled anew", path)
            return None
        return blob

    def _save(self, key: str, blob: bytes) -> None:
        data = _MAGIC + hashlib.sha256(blob).digest() + blob
        with suppress(FileNotFoundError):
            self._path(key).unlink()  # one that was of no use
        if not make_room(self._folder, _SUFFIX, len(data), self._max_bytes):
            raise OSError(f"its {len(data)} bytes are more than the {self._max_bytes} that the cache may have")
        write_whole(self._path(key), data)

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
