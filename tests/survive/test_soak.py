"""A small share of the long soak (``python -m tests.survive.soak``)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.survive import soak
from tests.survive.soak import html


@pytest.mark.timeout(240)
def test_every_answer_is_accounted_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_GLM_HOME", str(tmp_path))
    monkeypatch.setattr(soak, "TRIM_S", 0.5)
    result = soak.soak(300, 1, print)
    assert result["problems"] == []
    counts = result["counts"]
    assert sum(counts.values()) == 300
    assert counts["right"] > 100
    assert counts["left"] > 10
    page = html(result)
    assert "300 requests in one process" in page
    assert "http" not in page
