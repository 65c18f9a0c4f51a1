"""Why a disk did not do as it was told, and what helps."""

from __future__ import annotations

import errno
import sqlite3

_FULL = "free some space there, and do it again"
_READ_ONLY = "the disk is read-only: make it writable, or choose a folder on another one"
_HELPS = {errno.ENOSPC: _FULL, errno.EDQUOT: _FULL, errno.EROFS: _READ_ONLY}
UNCLEAR = "the disk may be full, read-only or broken: see to it, and do it again"
"""Where a library does not say."""
_SQLITE_HELPS = {
    sqlite3.SQLITE_FULL: _FULL,
    sqlite3.SQLITE_READONLY: _READ_ONLY,
    sqlite3.SQLITE_IOERR: UNCLEAR,
    sqlite3.SQLITE_CANTOPEN: UNCLEAR,
}
_PRIMARY = 0xFF
"""Of SQLite's extended codes."""


def why(error: OSError | sqlite3.Error) -> str:
    """In the system's words, with the next step where a disk is full or read-only."""
    if isinstance(error, sqlite3.Error):
        helps = _SQLITE_HELPS.get(getattr(error, "sqlite_errorcode", 0) & _PRIMARY)
        words = str(error)
    else:
        helps = _HELPS.get(error.errno or 0)
        words = error.strerror or str(error)
    return words if helps is None else f"{words}; {helps}"


def of_the_disk(error: OSError | sqlite3.Error) -> bool:
    """Whether it may be over once somebody has seen to the disk; else the file itself is wrong."""
    if isinstance(error, sqlite3.Error):
        return getattr(error, "sqlite_errorcode", 0) & _PRIMARY in _SQLITE_HELPS
    return error.errno in _HELPS
