"""A JSON file of records in the cache, to which several processes may add: what was measured, timed and tuned here."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import msgspec

from edge_runtime.disk import why
from edge_runtime.errors import StorageError
from edge_runtime.locks import file_lock

LARGEST = 16 << 20
"""Bytes that are read: several times what a full file has."""
T = TypeVar("T")


class _Runs(msgspec.Struct, Generic[T], frozen=True, forbid_unknown_fields=True, kw_only=True):
    schema_version: Literal[1] = 1
    runs: list[T]


class RecordFile(Generic[T]):
    """Read strictly, and only as a whole: one record that cannot be makes the file a broken one."""

    def __init__(
        self, file: Path, record: type[T], kept: int, log: logging.Logger, remedy: str, *, bare: bool = False
    ) -> None:
        """``kept``: records, of which the oldest go first. ``remedy``: what to do about a file that cannot be used, for
        the log. ``bare``: the file is a list, without a version."""
        self._file = file
        self._kept = kept
        self._log = log
        self._remedy = remedy
        self._bare = bare
        form: Any = list[record] if bare else _Runs[record]  # type: ignore[valid-type]
        self._decoder = msgspec.json.Decoder(form)

    @property
    def broken(self) -> Path:
        """Where a file goes that could not be decoded, once there is a new one to take its place."""
        return self._file.with_suffix(".broken.json")

    def read(self) -> list[T]:
        """Oldest first. Never fails: a file that cannot be used counts as an empty one, and that is said in the log."""
        try:
            return self._read()
        except (OSError, msgspec.DecodeError, RecursionError) as error:
            self._log.warning("what is kept in %s is not used: %s; %s", self._file, error, self._remedy)
            return []

    def change(self, changed: Callable[[list[T]], list[T]]) -> None:
        """Write what ``changed`` makes of the records, no other process changing them meanwhile. A file that cannot be
        decoded is put aside. StorageError if it cannot be read, or the new one not written: then nothing changes."""
        fresh, undecodable = self._file.with_suffix(".new"), ""
        with file_lock(self._file.with_suffix(".lock")):
            try:
                try:
                    before = self._read()
                except (msgspec.DecodeError, RecursionError) as error:
                    before, undecodable = [], str(error)
                records = changed(before)[-self._kept :]
                fresh.write_bytes(msgspec.json.encode(records if self._bare else _Runs(runs=records)))
                if undecodable:
                    self._file.replace(self.broken)
                fresh.replace(self._file)
            except OSError as error:
                raise StorageError(f"cannot write {self._file}: {why(error)}") from error
            finally:
                with suppress(OSError):
                    fresh.unlink()
        if undecodable:
            self._log.warning(
                "what was kept in %s could not be read and is in %s now: %s", self._file, self.broken, undecodable
            )

    def _read(self) -> list[T]:
        """OSError, msgspec.DecodeError, RecursionError."""
        try:
            if self._file.stat().st_size > LARGEST:
                raise msgspec.DecodeError(f"it is larger than {LARGEST >> 20} MiB")
            found = self._decoder.decode(self._file.read_bytes())
        except FileNotFoundError:
            return []
        return list(found if self._bare else found.runs)
