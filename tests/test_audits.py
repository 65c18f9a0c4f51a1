"""No usual mistake in what is installed, and no known hole in what it stands on."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
EXPLAINED: dict[str, str] = {}
"""Known holes of dependencies that do not concern us, by their ids: why not."""


def test_bandit_finds_nothing() -> None:
    """Exceptions have their reason in pyproject.toml, or in their line behind ``nosec``."""
    command = [sys.executable, "-m", "bandit", "-q", "-c", "pyproject.toml", "-f", "json"]
    done = subprocess.run(
        [*command, "-r", "devices", "edge_runtime", "exporters"], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    found = json.loads(done.stdout)
    assert found["errors"] == []
    assert found["metrics"]["_totals"]["loc"] > 30_000
    assert [(each["test_id"], each["filename"], each["line_number"]) for each in found["results"]] == []


def test_every_exception_has_a_reason() -> None:
    marks = [
        (path.relative_to(ROOT).as_posix(), line.strip())
        for folder in ("devices", "edge_runtime", "exporters")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"#\s*nosec", line)
    ]
    assert marks
    assert [mark for mark in marks if not re.search(r"# nosec B\d{3}  # \w+", mark[1])] == []


def installed() -> list[str]:
    """``name==version`` of what the program needs to run, here."""
    waiting, met = ["edge-glm"], {}
    while waiting:
        name = waiting.pop()
        if name in met:
            continue
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # for another platform
            continue
        met[name] = found.version
        for text in found.requires or ():
            need = Requirement(text)
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                waiting.append(re.sub(r"[-_.]+", "-", need.name).lower())
    return [f"{name}=={version}" for name, version in sorted(met.items()) if name != "edge-glm"]


def test_no_known_hole_in_what_is_needed(tmp_path: Path) -> None:
    """By PyPI's advisories. Skipped where they cannot be asked: nothing that was not asked about counts as clean."""
    needed = installed()
    assert len(needed) > 20
    (tmp_path / "needed.txt").write_text("\n".join(needed), encoding="utf-8")
    command = [sys.executable, "-m", "pip_audit", "-r", str(tmp_path / "needed.txt"), "--no-deps", "--disable-pip"]
    try:
        done = subprocess.run(
            [*command, "-f", "json", "--progress-spinner", "off", "--timeout", "10"],
            capture_output=True,
            text=True,
            timeout=120,
        )
    except subprocess.TimeoutExpired:
        pytest.skip("the vulnerability service does not answer")
    if not done.stdout.startswith("{"):
        pytest.skip(
            f"the vulnerability service cannot be asked: {(done.stderr.strip().splitlines() or ['?'])[-1][:200]}"
        )
    answers = json.loads(done.stdout)["dependencies"]
    found = {hole["id"]: each["name"] for each in answers for hole in each.get("vulns", ())}
    assert {hole: name for hole, name in found.items() if hole not in EXPLAINED} == {}
    names = {each.partition("==")[0] for each in needed}
    unknown = sorted(names - {each["name"] for each in answers if "skip_reason" not in each})
    if unknown:
        pytest.skip(f"the vulnerability service does not know {', '.join(unknown)}; it knows nothing bad of the others")


def test_one_that_is_unknown_does_not_count_as_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [each.partition("==")[0] for each in installed()]
    answers: list[dict[str, object]] = [{"name": name, "vulns": []} for name in names[1:]]
    answers.append({"name": names[0], "skip_reason": "it is not on PyPI"})
    done = subprocess.CompletedProcess[str]([], 0, json.dumps({"dependencies": answers}), "")
    monkeypatch.setattr(subprocess, "run", lambda *given, **options: done)
    with pytest.raises(pytest.skip.Exception, match=f"does not know {names[0]};"):
        test_no_known_hole_in_what_is_needed(tmp_path)
