"""Folders that other tools have written: a tiny llama by optimum-intel and by onnxruntime-genai's builder
(tests/tools), whose own runtimes' answers ours must give too."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from devices import DecoderOptions, Step, open_decoder
from edge_runtime.errors import CorruptModel, EdgeError, ModelNotFound, UnsupportedModel
from edge_runtime.exporting import export_package
from edge_runtime.llm import EdgeLLM
from edge_runtime.recipe import Recipe
from edge_runtime.sampling import SamplingParams
from tests.runtime.hub import Hub, serve_hub

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-P", "-m", "edge_runtime.cli.main"]
FOREIGN = Path(__file__).parents[1] / "fixtures" / "foreign"
OPTIMUM, GENAI = FOREIGN / "optimum", FOREIGN / "genai"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGE_GLM_HOME", str(tmp_path / "home"))
    return tmp_path


def check_answers(llm: EdgeLLM, folder: Path = OPTIMUM) -> None:
    expected = json.loads((folder / "expected.json").read_text())
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


def test_onnxruntime_genais_answers(home: Path) -> None:
    with EdgeLLM(str(GENAI)) as llm:
        assert (llm.device, llm.variant.name) == ("onnxruntime:cpu", "onnx-fp32")
        check_answers(llm, GENAI)
        assert llm.generate([{"role": "user", "content": "abc"}], SamplingParams(max_tokens=5)).text
    package = export_package(str(GENAI), home / "p", ["onnxruntime"], None)
    for name in ("model.onnx", "model.onnx.data"):
        assert (package.folder / "onnx-fp32" / name).read_bytes() == (GENAI / name).read_bytes()
    with EdgeLLM(str(home / "p"), prefix_cache_bytes=0) as llm:
        ids = list(range(3, 60))
        params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        alone = [llm.generate(ids[: 10 + step], params).token_ids for step in range(8)]
        with ThreadPoolExecutor(8) as threads:
            together = threads.map(lambda step: llm.generate(ids[: 10 + step], params).token_ids, range(8))
        assert list(together) == alone


@pytest.mark.parametrize("folder", [OPTIMUM, GENAI], ids=lambda folder: folder.name)
def test_it_has_one_variant(home: Path, folder: Path) -> None:
    """Also where it was opened before, and another is asked for then."""
    EdgeLLM(str(folder)).close()
    with pytest.raises(EdgeError, match=r"graph that is made already.*leave device and weights out"):
        EdgeLLM(str(folder), weights="int8")
    other = {OPTIMUM: "edge:cpu", GENAI: "openvino:cpu"}[folder]
    with pytest.raises(EdgeError, match=r"has a graph that is made already"):
        EdgeLLM(str(folder), other)


@pytest.mark.parametrize("size", [48, 95, 192])
@pytest.mark.parametrize(("folder", "file"), [(OPTIMUM, "config.json"), (GENAI, "genai_config.json")])
def test_a_configuration_of_another_model(home: Path, folder: Path, file: str, size: int) -> None:
    """Its vocabulary is not the graph's; half of it would even divide what the graph gives."""
    shutil.copytree(folder, home / "other")
    text = (folder / file).read_text().replace('"vocab_size": 96', f'"vocab_size": {size}')
    (home / "other" / file).write_text(text)
    with pytest.raises(EdgeError), EdgeLLM(str(home / "other"), prefix_store_bytes=0) as llm:
        llm.generate("abc", SamplingParams(max_tokens=1))


def test_a_name_that_is_too_long(home: Path) -> None:
    shutil.copytree(GENAI, home / "other")
    config = home / "other" / "genai_config.json"
    config.write_text(config.read_text().replace('"model.onnx"', f'"{"x" * 5000}"'))
    with pytest.raises(CorruptModel, match=r"which genai_config\.json names"):
        export_package(str(home / "other"), home / "p", ["onnxruntime"], None)


def test_in_chunks_as_whole(home: Path) -> None:
    """Logits of chunks, forks and of what is left after a crop are those of one pass (whose answers the test above
    holds against onnxruntime-genai's own)."""
    package = export_package(str(GENAI), home / "p", ["onnxruntime"], None)
    ids = np.arange(72, dtype=np.int64) * 7 % 94
    spec = package.spec(package.manifest.variants[0])
    decoder = open_decoder(spec, "onnxruntime:cpu", DecoderOptions(max_sequences=3, kv_tokens=256, threads=2))
    whole = decoder.new_sequence(72)
    (expected,) = decoder.forward([Step(whole, ids, rows=72)])
    whole.close()
    for sizes in ((1, 3, 20, 1, 47), (1,) * 72):
        sequence = decoder.new_sequence(72)
        rows, start = [], 0
        for size in sizes:
            rows += decoder.forward([Step(sequence, ids[start : start + size], rows=size)])
            start += size
        np.testing.assert_allclose(np.concatenate(rows), expected, atol=1e-4, rtol=0)
        fork = sequence.fork(40)
        again = decoder.forward([Step(fork, ids[40:72], rows=32)])[0]
        np.testing.assert_allclose(again, expected[40:], atol=1e-4, rtol=0)
        assert sequence.crop(10) == 10
        again = decoder.forward([Step(sequence, ids[10:20], rows=10)])[0]
        np.testing.assert_allclose(again, expected[10:20], atol=1e-4, rtol=0)
        sequence.close()
        fork.close()
    decoder.check_integrity()
    decoder.close()


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


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (lambda f: (f / "model.onnx.data").unlink(), CorruptModel, "lacks model.onnx.data"),
        (lambda f: (f / "model.onnx").unlink(), CorruptModel, "has no model.onnx"),
        (lambda f: (f / "model.onnx").write_bytes(b"x"), CorruptModel, "not an ONNX graph|takes no"),
        (lambda f: (f / "tokenizer.json").unlink(), UnsupportedModel, "no tokenizer.json"),
        (lambda f: (f / "genai_config.json").write_text("{}"), UnsupportedModel, "tells of no decoder"),
        (lambda f: (f / "genai_config.json").write_text('{"model": {"decoder": {}}}'), CorruptModel, "KeyError"),
    ],
)
def test_genai_folders_that_cannot_be_used(home: Path, spoil: Any, error: type[Exception], words: str) -> None:
    shutil.copytree(GENAI, home / "m")
    spoil(home / "m")
    with pytest.raises((error, UnsupportedModel), match=words):
        export_package(str(home / "m"), home / "p", ["onnxruntime"], None)
    assert not (home / "p").exists()


def test_other_engines_do_not_have_it(home: Path) -> None:
    with pytest.raises(ModelNotFound, match="it has: openvino-fp32"):
        EdgeLLM(str(OPTIMUM), "onnxruntime:cpu")
    with pytest.raises(UnsupportedModel, match="leave the recipe out"):
        export_package(str(OPTIMUM), home / "p", ["openvino"], "int4", recipe=Recipe())
