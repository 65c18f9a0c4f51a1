"""API keys of this machine's server: several, each with a name, of which only digests are kept.

Keys are 256 random bits, so that one round of SHA-256 is enough (NIST SP 800-63B, 5.1.2: look-up secrets): there is
nothing to guess that a slow hash would protect.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from edge_runtime.disk import why
from edge_runtime.errors import ConfigError, StorageError
from edge_runtime.locks import file_lock

PREFIX = "eg-"
"""So that scanners for leaked secrets can know one."""
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    digest: str
    """SHA-256 of the key, hexadecimal."""
    created: int
    """Unix time, seconds."""
    per_minute: int | None = None
    """Requests; None: as the server says for all."""


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    keys: list[Key] = []


class KeyRing:
    """The keys in ``file``, as they are now: who changes it need not restart a server. Thread safe."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._stamp: tuple[int, int] | None = None
        self._keys: tuple[Key, ...] = ()

    @property
    def keys(self) -> tuple[Key, ...]:
        """StorageError if the file cannot be read: then nobody is let in."""
        with self._lock:
            stamp = self._stamp_now()
            if stamp != self._stamp:
                self._keys, self._stamp = _read(self._file), stamp
            return self._keys

    def find(self, given: str) -> Key | None:
        """The key that ``given`` is. Every key is compared, each in constant time."""
        return find(self.keys, given)

    def add(self, name: str, per_minute: int | None = None) -> str:
        """A new key, which is told once and cannot be found again. ConfigError for a name that is taken or is none."""
        if not _NAME.fullmatch(name):
            raise ConfigError(f"a key's name has 1 to 64 letters, digits, _, . or -, not {name!r}")
        if per_minute is not None and per_minute < 1:
            raise ConfigError(f"a key needs at least one request a minute, not {per_minute}")
        secret = PREFIX + secrets.token_urlsafe(32)
        with self._changing() as keys:
            if any(key.name == name for key in keys):
                raise ConfigError(f"there is a key called {name} already; edge-glm key rm {name}")
            keys.append(Key(name, digest(secret), int(time.time()), per_minute))
        return secret

    def remove(self, name: str) -> None:
        """ConfigError if there is none."""
        with self._changing() as keys:
            left = [key for key in keys if key.name != name]
            if len(left) == len(keys):
                there = ", ".join(key.name for key in keys) or "none"
                raise ConfigError(f"there is no key called {name} (there: {there})")
            keys[:] = left

    def _stamp_now(self) -> tuple[int, int] | None:
        with suppress(OSError):
            found = self._file.stat()
            return found.st_mtime_ns, found.st_size
        return None

    @contextmanager
    def _changing(self) -> Iterator[list[Key]]:
        """Whole or not at all, and one process at a time."""
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with file_lock(self._file.with_suffix(".lock")):
                keys = list(_read(self._file))
                yield keys
                written = self._file.with_suffix(".new")
                written.touch(mode=0o600)
                written.write_bytes(msgspec.json.format(msgspec.json.encode(_File(keys))))
                written.replace(self._file)
        except OSError as error:
            raise StorageError(f"cannot write {self._file}: {why(error)}") from error


def digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def find(keys: Sequence[Key], given: str) -> Key | None:
    """The one that ``given`` is. Digests have one length, so time says nothing about a key, its length included."""
    wanted, found = digest(given), None
    for key in keys:
        if hmac.compare_digest(key.digest, wanted):
            found = key
    return found


def _read(file: Path) -> tuple[Key, ...]:
    try:
        return tuple(msgspec.json.decode(file.read_bytes(), type=_File).keys)
    except FileNotFoundError:
        return ()
    except (OSError, msgspec.DecodeError, RecursionError) as error:
        raise StorageError(f"cannot read the API keys in {file}: {error}; remove it and add them anew") from error
