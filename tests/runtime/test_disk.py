"""What is said of a disk that does not do as it is told."""

from __future__ import annotations

import errno
import os
import sqlite3
from pathlib import Path

import pytest

from edge_runtime.disk import why


@pytest.mark.parametrize(
    ("number", "helps"), [(errno.ENOSPC, "free some space"), (errno.EROFS, "read-only: make"), (errno.EACCES, None)]
)
def test_the_system_s_words_and_what_helps(number: int, helps: str | None) -> None:
    words = os.strerror(number)
    told = why(OSError(number, words))
    assert told.startswith(words)
    assert (told == words) if helps is None else (helps in told)


def test_an_error_without_words() -> None:
    assert why(OSError("strange")) == "strange"


def test_sqlite_s_too(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "full.sqlite")
    connection.execute("CREATE TABLE t (x)")
    connection.execute("PRAGMA max_page_count = 1")
    with pytest.raises(sqlite3.OperationalError) as full:
        connection.execute("INSERT INTO t VALUES (zeroblob(100000))")
    assert why(full.value).endswith("free some space there, and do it again")
    with pytest.raises(sqlite3.OperationalError) as wrong:
        connection.execute("SELECT y FROM t")
    assert why(wrong.value) == "no such column: y"
    connection.close()
