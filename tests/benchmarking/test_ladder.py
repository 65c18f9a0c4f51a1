"""The ladder: its steps, what they have in common, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from edge_runtime.bench.ladder import climb as climbing
from edge_runtime.bench.ladder.baseline import Graph
from edge_runtime.bench.ladder.climb import climb
from edge_runtime.bench.ladder.job import Agreement, Answered, Climb, Ladder, Measured, Rung
from edge_runtime.bench.ladder.prompts import prompts
from edge_runtime.bench.ladder.report import ladder_page, ladder_table
from edge_runtime.bench.ladder.worker import Answer, Order
from edge_runtime.cli.recipes import parse_prune
from edge_runtime.errors import ConfigError, EdgeError
from edge_runtime.exporting import export_package
from edge_runtime.package import ArchitectureSummary
from edge_runtime.recipe import Recipe
from edge_runtime.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
SMALL = ["synthetic:tiny", "--ladder", "--repeats", "1", "--prompt-tokens", "64", "--new-tokens", "6"]
STEPS = ["fp32 unfused", "fp32 fused", "int8", "int4", "chunks, prefix reuse"]


def bench(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("EDGE_GLM_")}
    return subprocess.run(
        [sys.executable, "-P", "-m", "edge_runtime.cli.main", "bench", *arguments],
        env={**kept, "EDGE_GLM_HOME": str(home), "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"},
        cwd=home,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )


def test_both_engines_from_the_first_step_to_the_draft(tmp_path: Path) -> None:
    export_package("synthetic:tiny", tmp_path / "draft", ["onnxruntime-edge", "openvino"], "int4")
    files = ["--draft", "draft", "--output", "l.json", "--html", "l.html"]
    done = bench(tmp_path, *SMALL, *files)
    assert (done.returncode, done.stderr) == (0, "")
    ladder = msgspec.json.decode((tmp_path / "l.json").read_bytes(), type=Ladder)
    assert list(ladder.steps) == ["edge:cpu", "openvino:cpu"]
    for device, steps in ladder.steps.items():
        assert [step.rung.name for step in steps] == [*STEPS, "draft"]
        first, fused, int8, int4, chunks, draft = steps
        assert (first.top1, first.kl, first.same) == (1, 0, 1)
        assert fused.top1 > 0.99
        assert fused.kl < 1e-3
        assert fused.kl < int8.kl < int4.kl
        assert int4.top1 == chunks.top1 == draft.top1
        if device == "edge:cpu":  # on the engines' own kernels steps of several tokens round otherwise
            assert int4.same == chunks.same == draft.same
        for step in steps:
            assert step.seconds * 1e3 >= step.ttft_ms > 0
            assert step.peak_rss_bytes is None or step.peak_rss_bytes > 2**24
    for name in (*STEPS, "draft", "edge:cpu", "openvino:cpu"):
        assert name in done.stdout
        assert name in (tmp_path / "l.html").read_text(encoding="utf-8")
    assert not list((tmp_path / "cache").glob("ladder-*"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "cuda"], "--ladder climbs on"),
        (["--device", "auto"], "--ladder climbs on"),
        (["--weights", "int4"], "--weights has no meaning"),
        (["--url", "http://127.0.0.1:1"], "--url has no meaning"),
        (["--every-device"], "--every-device has no meaning"),
        (["--draft-device", "edge:cpu"], "name one"),
        (["--prompt-tokens", "3"], "--prompt-tokens must be at least 16"),
        (["--repeats", "20000"], "more than the"),
        (["--output", "nowhere/l.json"], "there is no folder"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_refused(tmp_path: Path, arguments: list[str], words: str) -> None:
    done = bench(tmp_path, *SMALL, *arguments)
    assert done.returncode != 0
    assert done.stderr.count("\n") == 1
    assert words in done.stderr


def test_a_package_has_no_unfused_graph(tmp_path: Path) -> None:
    export_package("synthetic:tiny", tmp_path / "p", ["onnxruntime-edge"], "int4")
    done = bench(tmp_path, "p", "--ladder")
    assert "the ladder needs the model it was made from" in done.stderr
    done = bench(tmp_path, "synthetic:tiny", "--draft", "p")
    assert "--draft is for a --ladder" in done.stderr
    done = bench(tmp_path, "--ladder")
    assert "a ladder needs a model reference" in done.stderr


def test_prompts_share_their_beginning_within_a_round_only(tmp_path: Path) -> None:
    package = export_package("synthetic:tiny", tmp_path / "p", ["onnxruntime-edge"], "int4")
    job = Climb(ref="m", prompt_tokens=64, requests=3, repeats=2)
    rounds = prompts(Tokenizer.from_folder(package.folder), job)
    assert [len(each) for each in rounds] == [3, 3, 3]
    assert {len(prompt) for each in rounds for prompt in each} == {64}
    for each in rounds:
        assert len({tuple(prompt[:56]) for prompt in each}) == 1
        assert len({tuple(prompt[56:]) for prompt in each}) == 3
    assert len({tuple(each[0][:56]) for each in rounds}) == 3


def fake(measured: dict[str, Measured], fails: str = "", heard: list[Order] | None = None) -> object:
    """In place of the processes; ``heard``: gets what they were to do."""
    architecture = ArchitectureSummary("llama", 1, 1, 1, 1, 1, 1, 1, 1)

    def ask(module: str, line: bytes) -> bytes:
        order = msgspec.json.decode(line, type=Order)
        if heard is not None:
            heard.append(order)
        if order.rung.device == fails:
            return msgspec.json.encode(Answer(error="no such luck"))
        if order.what == "prepare":
            return msgspec.json.encode(Answer(graph=Graph(architecture, "f") if order.rung.unfused else None))
        if order.what == "agree":
            return msgspec.json.encode(Answer(agreement=Agreement(0.5, 0.25)))
        return msgspec.json.encode(Answer(measured=measured.get(order.rung.name, ROUNDS)))

    return ask


def answered(tokens: str, first: float, last: float) -> Answered:
    return Answered([ord(token) for token in tokens], first, last)


FAST, SLOW = answered("abcd", 1, 4), answered("abcd", 3, 9)
ROUNDS = Measured([[FAST, answered("abcd", 1, 6)], [SLOW, SLOW]], 800)


def test_figures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The mean of a round, the median of the rounds; tokens up to the first that differs."""
    monkeypatch.setenv("EDGE_GLM_HOME", str(tmp_path))
    other = Measured([[answered("abxd", 0.5, 2), answered("abcd", 0.5, 2)]] * 2, 200)
    monkeypatch.setattr(climbing, "ask", fake({"int4": other}))
    ladder = climb(Climb(ref="m", device="edge:cpu"))
    first, *_, int4, chunks = ladder.steps["edge:cpu"]
    assert (first.seconds, first.ttft_ms, first.tpot_ms) == (7, 2000, pytest.approx(5000 / 3))
    assert (int4.seconds, int4.ttft_ms, int4.tpot_ms) == (2, 500, 500)
    assert (int4.same, chunks.same) == (0.75, 1)
    assert (int4.top1, int4.kl) == (0.5, 0.25)
    text, page = ladder_table(ladder), ladder_page(ladder)
    assert "-71%" in text
    assert "-75%" in text
    assert "-71%" in page
    assert json.loads(msgspec.json.encode(ladder))["steps"]["edge:cpu"][0]["rung"]["unfused"] is True


def test_a_package_in_place_of_int4(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGE_GLM_HOME", str(tmp_path))
    heard: list[Order] = []
    monkeypatch.setattr(climbing, "ask", fake({}, heard=heard))
    climb(Climb(ref="m", device="edge:cpu", int4="mine", draft="small"))
    refs = {(each.what, each.rung.name): each.rung.ref for each in heard}
    assert {key for key, ref in refs.items() if ref == "mine"} == {
        key for key in refs if key[1] in (*STEPS[3:], "draft")
    }
    assert {ref for ref in refs.values() if ref != "mine"} == {None}


def test_one_engine_that_fails_does_not_cost_the_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGE_GLM_HOME", str(tmp_path))
    monkeypatch.setattr(climbing, "ask", fake({}, fails="edge:cpu"))
    ladder = climb(Climb(ref="m"))
    assert list(ladder.steps) == ["openvino:cpu"]
    assert ladder.problems == {"edge:cpu": "fp32 unfused: no such luck"}
    assert "edge:cpu: fp32 unfused: no such luck" in ladder_table(ladder)
    with pytest.raises(ConfigError, match="no such luck"):
        climb(Climb(ref="m", device="edge:cpu"))


def test_a_package_of_another_vocabulary_is_refused_when_it_is_prepared(tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("see the sea")
    prune, kept = parse_prune(f"vocab={tmp_path / 'kept.txt'}")
    recipe = Recipe(prune=prune)
    export_package("synthetic:tiny", tmp_path / "p", ["onnxruntime-edge"], "int4", recipe=recipe, vocabulary=kept)
    done = bench(tmp_path, *SMALL, "--device", "edge:cpu", "--int4", "p")
    assert "and synthetic:tiny 512: what they choose cannot be compared" in done.stderr
    assert done.stdout == ""


def test_what_fails_on_both_is_told_once(tmp_path: Path) -> None:
    done = bench(tmp_path, "nowhere.gguf", "--ladder")
    assert done.stderr.startswith("edge-glm: edge:cpu, openvino:cpu: fp32 unfused: ")
    assert done.stderr.count("nowhere.gguf") == 1


def test_a_process_that_dies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGE_GLM_HOME", str(tmp_path))

    def ask(module: str, line: bytes) -> bytes:
        raise EdgeError("the measuring process was ended by signal 9; is there enough memory?")

    monkeypatch.setattr(climbing, "ask", ask)
    with pytest.raises(ConfigError, match="is there enough memory"):
        climb(Climb(ref="m"))
    assert not list((tmp_path / "cache").iterdir())


def test_the_last_step_is_there_with_a_draft_only() -> None:
    assert [rung.name for rung in Climb(ref="m").rungs("edge:cpu")] == STEPS
    job = Climb(ref="m", draft="d", draft_device="edge:cpu", memory_budget="1GiB")
    *_, chunks, last = job.rungs("openvino:cpu")
    assert chunks == Rung("chunks, prefix reuse", "openvino:cpu", "int4", reuse=True, memory_budget="1GiB")
    assert last == Rung("draft", "openvino:cpu", "int4", reuse=True, draft="d", draft_device="edge:cpu")
