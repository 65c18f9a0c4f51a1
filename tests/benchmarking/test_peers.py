"""The table of edge-glm beside peers, with a stand-in for the peers' script."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.bench.peers import COLUMNS, last_json, table


def row(scale: float) -> dict[str, float]:
    return {name: scale * (1 + index) for index, name in enumerate(COLUMNS)}


def test_ratios_are_within_rounds() -> None:
    """The machine was twice as fast in the second round and thrice in the third: that cancels."""
    rounds = [{"ours": row(300 * drift), "peer": row(100 * drift)} for drift in (1, 2, 3)]
    for each in rounds:
        del each["peer"]["start_s"], each["peer"]["nll"]  # peers' scripts do not measure them
    lines = table(rounds, ["peer"], 8).splitlines()
    assert "8 streams, tokens/s" in lines[0]
    assert lines[2:] == [
        "| ours | 600 | 1200 | 1800 | 2400 | 3000 | 3600 | 4200 |",
        "| peer | 200 | 400 | 600 | 800 | – | 1200 | – |",
        "| ours / peer | 3.00 | 3.00 | 3.00 | 3.00 | – | 3.00 | – |",
    ]


@pytest.mark.parametrize("text", ["noise\\n" + '{"a": 1}', '{\\n  "a": 1\\n}'])
def test_last_json(text: str, tmp_path: Path) -> None:
    script = tmp_path / "peer.py"
    script.write_text(f"print('''{text}''')")
    assert last_json([sys.executable, script]) == {"a": 1}


def test_a_peer_that_fails() -> None:
    with pytest.raises(SystemExit, match="failed with exit code 5"):
        last_json([sys.executable, "-c", "raise SystemExit(5)"])
