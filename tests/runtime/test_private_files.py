"""What is kept of users is theirs alone, and files of ours are not led elsewhere by links."""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_runtime.deferred.queue import Queue
from edge_runtime.egress.ledger import Ledger
from edge_runtime.errors import StorageError
from edge_runtime.keys import KeyRing
from edge_runtime.locks import HeldLock, file_lock
from edge_runtime.policy.rules import Deferred
from tests.tiers.test_ledger import sending

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")


def modes(folder: Path) -> dict[str, int]:
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}


def with_ledger(path: Path) -> None:
    ledger = Ledger(path)
    ledger.send(sending())
    assert set(modes(path.parent).values()) == {0o600}  # with the write-ahead log beside it
    ledger.close()


def with_queue(path: Path) -> None:
    queue = Queue(path)
    queue.add(b"{}", Deferred())
    assert set(modes(path.parent).values()) == {0o600}
    queue.close()


def with_keys(path: Path) -> None:
    KeyRing(path).add("anna")
    assert set(modes(path.parent).values()) == {0o600}


@pytest.mark.parametrize("use", [with_ledger, with_queue, with_keys])
@pytest.mark.parametrize("before", [None, 0o644, 0o666])
def test_only_their_user_reads_them(use: Callable[[Path], None], before: int | None, tmp_path: Path) -> None:
    """Also where another program, or an older version, has left them open to all."""
    old = os.umask(0)
    try:
        path = tmp_path / "data" / "file"
        if before is not None:
            path.parent.mkdir()
            path.write_bytes(b"{}" if use is with_keys else b"")
            path.chmod(before)
        use(path)
    finally:
        os.umask(old)


def test_a_lock_follows_no_link(tmp_path: Path) -> None:
    """In a folder for all, such as /tmp, somebody else may have laid it there."""
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "lock").symlink_to(tmp_path / "precious")
    (tmp_path / "new.lock").symlink_to(tmp_path / "not there yet")
    for name in ("lock", "new.lock"):
        with pytest.raises(StorageError, match="cannot make the lock file"), file_lock(tmp_path / name):
            raise AssertionError("it was taken")
        with pytest.raises(StorageError):
            HeldLock(tmp_path / name).try_acquire()
    assert (tmp_path / "precious").read_text() == "mine"
    assert not (tmp_path / "not there yet").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="there any failure to lock means that another holds it")
def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    lock = HeldLock(tmp_path / "lock")
    with pytest.raises(StorageError, match=r"cannot lock .*: No locks available"):
        lock.try_acquire()
    with pytest.raises(StorageError, match="cannot lock"), file_lock(tmp_path / "other"):
        pass
    monkeypatch.undo()
    assert lock.try_acquire()
    lock.release()
