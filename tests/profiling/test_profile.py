"""``edge-glm profile`` as a user meets it: in processes of its own, over tiny models on real engines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_runtime.bench.job import Job
from edge_runtime.cli.main import main
from edge_runtime.errors import EngineError
from edge_runtime.profiling import operators
from edge_runtime.profiling.measure import measure
from edge_runtime.profiling.result import Limits
from tests.conftest import usable
from tests.profiling.profiles import make_profile

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-P", "-m", "edge_runtime.cli.main", "profile"]
# answers so long that on a busy machine, too, readers see them grow
SMALL = ["synthetic:tiny", "--prompt-tokens", "48", "--new-tokens", "60"]
Profile = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def profile(home: Path, tmp_path: Path) -> Profile:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("EDGE_GLM_")}
    environment = {**kept, "EDGE_GLM_HOME": str(home), "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [*COMMAND, *arguments]
        return subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=200
        )

    return run


@pytest.mark.parametrize("device", ["edge:cpu", "onnxruntime:cpu", "openvino:cpu"])
def test_json_and_page(profile: Profile, device: str, tmp_path: Path) -> None:
    done = profile(*SMALL, "--device", usable(device), "--requests", "3", "--json", "--html", "a.html")
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    assert (result["model"], result["device"], result["requests"]) == ("synthetic:tiny", device, 3)
    assert result["covered"] > 0.9
    parts = {each["part"]: each for each in result["parts"]}
    assert {"tokenize", "queue", "prefill", "decode", "sample", "detokenize"} & set(parts) >= {"prefill", "decode"}
    assert sum(each["critical"] for each in parts.values()) == pytest.approx(1, abs=1e-3)
    assert all(each["ms"]["p50"] <= each["ms"]["p95"] <= each["ms"]["p99"] for each in parts.values())
    for path in result["critical_paths"]:
        assert sum(part["share"] for part in path["parts"]) == pytest.approx(1)
        assert {"caller", "engine"} <= {part["lane"] for part in path["parts"]}
    prefill, decode = result["phases"]
    assert (prefill["name"], prefill["calls"], prefill["tokens"]) == ("prefill", 1, 48)
    assert (decode["name"], decode["calls"], decode["tokens"]) == ("decode", 32, 1)
    for phase in (prefill, decode):
        assert phase["operators_ms"] > 0
        hot = [group for group in phase["groups"] if group["of_bandwidth"] is not None]
        assert any("Attention" in group["kind"] for group in hot)
        assert any("→ 512" in group["shape"] for group in hot)  # the head
        assert sum(group["ms"] for group in phase["groups"]) == pytest.approx(phase["operators_ms"])
    assert [each["name"] for each in result["usage"]] == ["open", "warm up", "requests"]
    if sys.platform != "win32":
        assert sum(each["minor_faults"] for each in result["usage"]) > 100
    memory = result["memory"]
    assert [name for _, name in memory["marks"]] == ["open", "warm up", "requests", "close"]
    assert memory["peak"] == max(resident for _, resident in memory["samples"])
    assert memory["planned"]["base"] > memory["planned"]["weights"] > 0
    page = (tmp_path / "a.html").read_text()
    assert page.count("<canvas") == (2 if device == "openvino:cpu" else 4)  # OpenVINO tells no times of operators
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]


def test_table_of_several_at_once_under_a_budget(profile: Profile, tmp_path: Path) -> None:
    options = ("--device", "onnxruntime:cpu", "--concurrency", "3", "--requests", "6", "--memory-budget", "600MiB")
    done = profile(*SMALL, *options)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(
        "synthetic:tiny int4 on onnxruntime:cpu\n6 requests of 48 prompt and 60 new tokens, 3 at"
    )
    assert "decode: 32 calls of 3 tokens" in done.stdout
    assert "budget 600.0 MiB" in done.stdout
    assert (tmp_path / "profile.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no such thing"], "'no such thing' names no model"),
        (["synthetic:tiny", "--device", "tpu"], "unknown device 'tpu'"),
        (["synthetic:tiny", "--memory-budget", "10MiB"], "more than the budget of 10.0 MiB"),
        (["synthetic:tiny", "--prompt-tokens", "1000"], "has 1024"),
        (["synthetic:tiny", "--concurrency", "4", "--requests", "3"], "--requests must be at least 4"),
        (["synthetic:tiny", "--new-tokens", "1"], "--new-tokens must be at least 2"),
        (["synthetic:tiny", "--html", "absent/a.html"], "cannot write absent/a.html: there is no folder"),
        (["synthetic:tiny", "--html", "."], "cannot write .: it is a folder"),
    ],
)
def test_refusals_are_one_line(profile: Profile, arguments: list[str], message: str, tmp_path: Path) -> None:
    done = profile(*arguments)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_page_that_may_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root, as in containers, may anything
    assert main(["profile", "synthetic:tiny"]) == 1
    assert "cannot write profile.html: no permission; name another file with --html" in capsys.readouterr().err


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing needs to be."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("edge_runtime.profiling.process.run", lambda job, requests: make_profile())


@pytest.mark.usefixtures("measured")
def test_json_writes_no_page_that_nobody_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "profile.html").write_text("an earlier one")
    assert main(["profile", "synthetic:tiny", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "tiny & co"
    assert (tmp_path / "profile.html").read_text() == "an earlier one"


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize("json", [[], ["--json"]])
def test_what_was_measured_is_printed_though_the_page_cannot_be_written(
    json: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: object, **more: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert main(["profile", "synthetic:tiny", "--html", "a.html", *json]) == 1
    printed = capsys.readouterr()
    assert "tiny & co" in printed.out
    assert "with pictures" not in printed.out
    assert "cannot write a.html: No space left on device" in printed.err


def test_without_counters_the_rest_is_measured(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> list[operators.Counted]:
        raise EngineError("it has no counters")

    monkeypatch.setenv("EDGE_GLM_HOME", str(home))
    monkeypatch.setattr(operators, "count", refuse)
    monkeypatch.setattr("edge_runtime.profiling.measure.measure_limits", lambda most: Limits(1.0, 1.0, None))
    job = Job(ref="synthetic:tiny", device="onnxruntime:cpu", prompt_tokens=16, new_tokens=8, concurrency=2)
    profile = measure(job, 4)
    assert profile.result.no_operators == "it has no counters"
    assert profile.result.phases == []
    assert profile.result.requests == 4
    assert len(profile.charts) == 2
