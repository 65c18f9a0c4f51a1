"""A small share of the long soak (``python -m tests.survive.soak``)."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_runtime.server.response_store import MOST
from edge_runtime.tracing.ring import MOST_TRACES
from tests.survive import soak
from tests.survive.soak import html


@pytest.mark.timeout(240)
def test_every_answer_is_accounted_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_GLM_HOME", str(tmp_path))
    monkeypatch.setattr(soak, "TRIM_S", 0.5)
    monkeypatch.setattr(soak, "FILL", 20)
    monkeypatch.setattr(soak, "ROUND", 50)  # of one round memory could not grow
    monkeypatch.setattr(soak, "GROWTH", 0.25)  # what is kept of requests is filling up yet
    result = soak.soak(300, 1, print)
    assert result["problems"] == []
    counts = result["counts"]
    assert sum(counts.values()) == 300
    assert counts["left"] > 10
    assert [asked for asked, _ in result["levels"]] == [50, 100, 150, 200, 250, 300]
    page = html(result)
    assert "300 requests in one process" in page
    assert "http" not in page


def test_what_is_kept_of_requests_has_filled_up_when_memory_begins_to_count() -> None:
    assert soak.FILL >= MOST
    assert int(soak.WARM_UP * 20_000) >= MOST_TRACES


def test_a_run_in_which_all_is_refused_is_none() -> None:
    assert soak.uneven({"right": 13_858, "left": 3041}, 20_000) == []
    (few, many) = soak.uneven({"refused": 20_000}, 20_000)
    assert "only 0 of 20000" in few
    assert "20000 of 20000 requests were refused" in many
