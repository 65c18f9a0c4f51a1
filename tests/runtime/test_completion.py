"""Completion in a real shell."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-P", "-m", "edge_runtime.cli.main", "completion"]


def script(shell: str) -> str:
    done = subprocess.run(
        [*COMMAND, shell], env={"PYTHONPATH": str(ROOT)}, capture_output=True, encoding="utf-8", timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("edge-glm se", {"serve"}),
        ("edge-glm ba", {"batch"}),
        ("edge-glm serve --memory", {"--memory-budget"}),
        ("edge-glm export --weights int", {"int8", "int4"}),
        ("edge-glm key a", {"add"}),
    ],
)
def test_bash(tmp_path: Path, words: str, completed: set[str]) -> None:
    (tmp_path / "edge-glm.bash").write_text(script("bash"))
    split = words.split()
    asked = f"""
        source edge-glm.bash
        COMP_WORDS=({words}); COMP_CWORD={len(split) - 1}; COMP_LINE="{words}"; COMP_POINT={len(words)}
        $(complete -p edge-glm | sed 's/.*-F \\([^ ]*\\).*/\\1/') edge-glm {split[-1]} {split[-2]}
        echo "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", asked], cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=60)
    assert completed == set(done.stdout.split()), done.stderr


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_others(shell: str) -> None:
    assert "memory-budget" in script(shell)
