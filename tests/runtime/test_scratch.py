"""Temporary folders: gone at the end, and those of killed processes at the next beginning."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from edge_runtime.errors import StorageError
from edge_runtime.scratch import scratch_folder

_KILLED = """
import os, sys
from pathlib import Path
from edge_runtime.scratch import scratch_folder
with scratch_folder("work-", Path(sys.argv[1])) as folder:
    (folder / "half").write_bytes(b"half")
    os.kill(os.getpid(), 9)
"""


def test_what_a_killed_process_left_is_removed_and_what_lives_is_not(tmp_path: Path) -> None:
    other = tmp_path / "other-dead"
    other.mkdir()
    with scratch_folder("work-", tmp_path) as alive:
        subprocess.run([sys.executable, "-c", _KILLED, str(tmp_path)], check=False, timeout=60)
        assert len(list(tmp_path.glob("work-*"))) == 4  # two folders, each with its lock
        with scratch_folder("work-", tmp_path) as folder:
            assert sorted(path for path in tmp_path.iterdir() if path.is_dir()) == sorted([alive, folder, other])
    assert list(tmp_path.iterdir()) == [other]


def test_only_what_this_makes_is_taken_for_a_dead_one(tmp_path: Path) -> None:
    names = ["work-of-my-house", "work-", f"work-{'0' * 31}", f"work-{'0' * 33}", f"work-{'G' * 32}"]
    ours = f"work-{'0123456789abcdef' * 2}"
    for name in (*names, ours):
        (tmp_path / name).mkdir()
    (tmp_path / "work-of-my-house.lock").touch()
    with scratch_folder("work-", tmp_path):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "work-of-my-house.lock"])


def test_where_none_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file"), scratch_folder("work-", tmp_path / "file"):
        pass
