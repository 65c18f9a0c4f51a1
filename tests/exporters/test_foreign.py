"""Folders that other tools have written: a tiny llama by optimum-intel (tests/tools/make_openvino_folder.py), whose own
runtime's answers ours must give too."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.errors import CorruptModel, ModelNotFound, UnsupportedModel
from edge_runtime.llm import EdgeLLM
from edge_runtime.recipe import Recipe
from edge_runtime.sampling import SamplingParams
from edge_runtime.store import export_package
from tests.runtime.hub import Hub, serve_hub

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-P", "-m", "edge_runtime.cli.main"]
OPTIMUM = Path(__file__).parents[1] / "fixtures" / "foreign" / "optimum"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGE_GLM_HOME", str(tmp_path / "home"))
    return tmp_path


def check_answers(llm: EdgeLLM) -> None:
    expected = json.loads((OPTIMUM / "expected.json").read_text())
    for prompt, answer in zip(expected["prompts"], expected["answers"], strict=True):
        params = SamplingParams(temperature=0, max_tokens=len(answer), ignore_eos=True)
        assert list(llm.generate(prompt, params).token_ids) == answer


def test_its_own_runtimes_answers(home: Path) -> None:
    with EdgeLLM(str(OPTIMUM), "openvino:cpu", kv_type="float32") as llm:
        check_answers(llm)
        assert llm.variant.name == "openvino-fp32"
        text = llm.generate([{"role": "user", "content": "abc"}], SamplingParams(max_tokens=5)).text
        assert text
    with EdgeLLM(str(OPTIMUM)) as llm:  # auto knows what it is for
        assert llm.device == "openvino:cpu"


def test_the_graph_is_theirs_byte_by_byte(home: Path) -> None:
    package = export_package(str(OPTIMUM), home / "p", ["openvino"], None)
    for name in ("openvino_model.xml", "openvino_model.bin"):
        assert (package.folder / "openvino-fp32" / name).read_bytes() == (OPTIMUM / name).read_bytes()
    with EdgeLLM(str(home / "p"), kv_type="float32") as llm:
        check_answers(llm)


def test_from_a_hub(tmp_path: Path) -> None:
    """With what such repositories have beside it, and of which nothing is fetched."""
    repo = tmp_path / "repo"
    shutil.copytree(OPTIMUM, repo)
    for name in ("openvino_tokenizer.xml", "openvino_detokenizer.bin", "README.md"):
        (repo / name).write_bytes(b"x")
    with serve_hub(Hub({"OpenVINO/tiny-ov": repo})) as hub:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "EDGE_GLM_"))}
        places = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "EDGE_GLM_HOME": str(tmp_path / "home")}
        done = subprocess.run(
            [*COMMAND, "run", "hf:OpenVINO/tiny-ov", "abc", "--max-tokens", "4"],
            env={**kept, **places, "NO_PROXY": "127.0.0.1", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            encoding="utf-8",
            timeout=100,
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert not any("tokenizer.xml" in each or "README" in each for each in hub.requests if "resolve" in each)


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (lambda f: (f / "openvino_model.bin").unlink(), CorruptModel, "no openvino_model.bin"),
        (lambda f: (f / "config.json").unlink(), UnsupportedModel, "no config.json"),
        (lambda f: (f / "tokenizer.json").unlink(), UnsupportedModel, "no tokenizer.json"),
        (lambda f: (f / "openvino_model.xml").write_text("<net/>"), UnsupportedModel, "lacks input_ids"),
        (
            lambda f: (f / "config.json").write_text('{"model_type": "mystery"}'),
            UnsupportedModel,
            "mystery",
        ),
    ],
)
def test_folders_that_cannot_be_used(home: Path, spoil: Any, error: type[Exception], words: str) -> None:
    shutil.copytree(OPTIMUM, home / "m")
    spoil(home / "m")
    with pytest.raises(error, match=words):
        export_package(str(home / "m"), home / "p", ["openvino"], None)
    assert not (home / "p").exists()


def test_other_engines_do_not_have_it(home: Path) -> None:
    with pytest.raises(ModelNotFound, match="it has: openvino-fp32"):
        EdgeLLM(str(OPTIMUM), "onnxruntime:cpu")
    with pytest.raises(UnsupportedModel, match="leave the recipe out"):
        export_package(str(OPTIMUM), home / "p", ["openvino"], "int4", recipe=Recipe())
