"""64 clients at once, mixed and leaving at random, on a real model: a fifth of a minute of tests/bench/soak.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edge_runtime.package import Package

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_every_answer_is_right_and_nothing_stays_behind(smollm2_package: Package, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.soak", str(smollm2_package.folder), "--minutes", "0.2"],
        cwd=ROOT,
        env={**os.environ, "EDGE_GLM_HOME": str(tmp_path)},
        capture_output=True,
        encoding="utf-8",
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 wrong" in done.stdout
