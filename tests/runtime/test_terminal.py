"""What is shown at a terminal, and that it is plain where it is piped: a command runs in a real pseudo-terminal."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from edge_runtime.columns import columns

pty = pytest.importorskip("pty", reason="pseudo-terminals are of POSIX", exc_type=ImportError)
ROOT = Path(__file__).parents[2]
BARS = """
import sys
from edge_runtime.cli.progress import Bars
with Bars() as bars:
    for done in range(4):
        bars("onnx-int4", done, 3)
    bars("openvino-int4", 1, 2)
print("kept")
"""
TABLE = "from edge_runtime.columns import columns; print(columns([['a', 'b'], ['1', '2']], head=True))"


def at_a_terminal(script: str, **environment: str) -> str:
    """All that ``script`` writes to both streams, where they are a terminal of 80 columns."""
    main, side = pty.openpty()
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "TERM")}
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        env={**kept, "TERM": "xterm", "COLUMNS": "80", "PYTHONPATH": str(ROOT), **environment},
        stdout=side,
        stderr=side,
    )
    os.close(side)
    told = b""
    while True:
        try:
            part = os.read(main, 4096)
        except OSError:  # Linux: the other side is closed
            break
        if not part:
            break
        told += part
    os.close(main)
    assert process.wait(30) == 0, told
    return told.decode()


def test_bars_are_gone_when_done() -> None:
    told = at_a_terminal(BARS)
    assert "preparing onnx-int4" in told
    assert "3 of 3 layers" in told
    assert "preparing openvino-int4" in told
    assert "\x1b[2K" in told  # lines were erased
    assert told.rstrip().endswith("kept")


def test_colours_can_be_declined() -> None:
    colour = re.compile(r"\x1b\[[0-9;]*3[0-9;]*m")
    assert colour.search(at_a_terminal(BARS))
    assert not colour.search(at_a_terminal(BARS, NO_COLOR="1"))


def test_no_bars_where_it_is_piped() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BARS], capture_output=True, encoding="utf-8", env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert (done.stdout, done.stderr, done.returncode) == ("kept\n", "", 0)


def test_a_head_is_bold_at_a_terminal_alone() -> None:
    assert "\x1b[1m" in at_a_terminal(TABLE)
    assert columns([["a", "b"], ["1", "2"]], head=True) == "a  b\n1  2"


@pytest.mark.parametrize("text", ["[red]x[/red]", "日本", "x" * 300, ""])
def test_cells_are_as_they_are(text: str) -> None:
    """Neither markup nor wrapped; each row is one line."""
    lines = columns([["name", "size"], [text, "1"], ["b", "22"]]).splitlines()
    assert len(lines) == 3
    assert lines[1].startswith(text)
    assert lines[1].endswith("1")


def test_columns_line_up() -> None:
    assert columns([["long name", "1", "x"], ["b", "22", "yy"]], "llr") == "long name  1    x\nb          22  yy"
    assert columns([]) == ""
