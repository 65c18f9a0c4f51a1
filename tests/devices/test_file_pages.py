"""Mapped model files are dropped from memory, and read again where they are looked at."""

from __future__ import annotations

import mmap
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from devices.file_pages import release_file_pages, releasing_file_pages

SIZE = 4 << 20


def resident(path: Path) -> int:
    """Bytes of a mapped file in memory, over all its mappings."""
    parts = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    return sum(int(re.findall(r"Rss:\s+(\d+)", part)[0]) * 1024 for part in parts if str(path) in part)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can be told")
def test_clean_pages_are_dropped_and_come_back(tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes(SIZE)
    inside, outside = tmp_path / "a model" / "weights.bin", tmp_path / "other.bin"
    inside.parent.mkdir()
    for path in (inside, outside):
        path.write_bytes(data)
    with inside.open("r+b") as a, outside.open("rb") as b:
        read_only = mmap.mmap(a.fileno(), SIZE, access=mmap.ACCESS_READ)
        private = mmap.mmap(a.fileno(), SIZE, access=mmap.ACCESS_COPY)
        other = mmap.mmap(b.fileno(), SIZE, access=mmap.ACCESS_READ)
        private[5] = data[5] ^ 1
        assert read_only[:] == other[:] == data
        before = resident(inside), resident(outside)
        assert before[0] >= SIZE <= before[1]
        release_file_pages(tmp_path / "a model")
        assert resident(inside) <= before[0] - SIZE
        assert resident(outside) == before[1]
        assert read_only[:] == data
        assert private[5] == data[5] ^ 1  # what was written stays
        for mapping in (read_only, private, other):
            mapping.close()


def test_a_folder_that_is_not_mapped(tmp_path: Path) -> None:
    release_file_pages(tmp_path)
    release_file_pages(tmp_path / "none")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can be told")
def test_what_is_read_meanwhile_is_dropped_soon(tmp_path: Path) -> None:
    data = np.random.default_rng(1).bytes(SIZE)
    path = tmp_path / "weights.bin"
    path.write_bytes(data)
    with path.open("r+b") as file:
        read_only = mmap.mmap(file.fileno(), SIZE, access=mmap.ACCESS_READ)
        private = mmap.mmap(file.fileno(), SIZE, access=mmap.ACCESS_COPY)
        private[:] = bytes(SIZE)
        with releasing_file_pages(tmp_path):
            assert read_only[:] == data
            end = time.monotonic() + 10
            while resident(path) > SIZE and time.monotonic() < end:
                time.sleep(0.01)
            assert resident(path) <= SIZE  # what is left is the written one
            assert read_only[:] == data
        assert resident(path) <= SIZE
        assert private[:] == bytes(SIZE)
        for mapping in (read_only, private):
            mapping.close()


def test_nothing_to_drop_meanwhile(tmp_path: Path) -> None:
    with releasing_file_pages(tmp_path):
        pass
