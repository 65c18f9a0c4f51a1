"""Every promise of SECURITY.md names tests, and they are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
ROWS = [
    (promise.strip(), re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", held))
    for promise, held in re.findall(r"^\| (?!promise)([^|]+)\|([^|]+)\|$", PAGE, re.M)
]
HEADINGS = ("Models", "Clients", "Servers elsewhere", "Secrets", "Supply chain")


def functions(path: Path) -> set[str]:
    """Names of a module's tests, without running it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    }


@pytest.mark.parametrize(("promise", "tests"), ROWS, ids=[promise[:40] for promise, _ in ROWS])
def test_each_promise_is_held_by_tests_that_exist(promise: str, tests: list[tuple[str, str]]) -> None:
    assert tests, promise
    missing = [
        f"{path}::{name}" for path, name in tests if not (ROOT / path).is_file() or name not in functions(ROOT / path)
    ]
    assert missing == []


def test_every_line_of_a_table_was_read() -> None:
    lines = [line for line in PAGE.splitlines() if line.startswith("|") and not line.startswith(("| promise", "|---"))]
    assert len(lines) == len(ROWS) > 30
    named = re.findall(r"`tests/[^`]+::[^`]+`", PAGE)
    assert len(named) == sum(len(tests) for _, tests in ROWS)


def test_every_threat_has_its_table_and_says_what_is_not_promised() -> None:
    for heading in HEADINGS:
        part = re.split(rf"^### {heading}$", PAGE, flags=re.M)[1].partition("\n### ")[0]
        assert "| promise | held by |" in part, heading
        assert re.search(r"^(?!\|)\w.*$", part, re.M), heading
