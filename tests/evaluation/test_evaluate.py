"""``edge-glm eval`` on small models with random weights."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edge_runtime import EdgeLLM
from edge_runtime.cli.main import main
from edge_runtime.errors import ConfigError
from edge_runtime.evaluation.evaluate import evaluate
from edge_runtime.evaluation.subject import Subject
from edge_runtime.evaluation.texts import calibration_text, evaluation_texts
from edge_runtime.paths import home as home_of
from edge_runtime.placement import Wish, place
from edge_runtime.recipe import Prune, Recipe
from edge_runtime.store import Store
from exporters.compression.compress import Text
from exporters.compression.shrink import Shrinking
from exporters.export import export
from exporters.formats import open_checkpoint
from exporters.synthetic import SyntheticCheckpoint
from tests.conftest import EXPORTS

DEVICES = ("edge:cpu", "onnxruntime:cpu", "openvino:cpu")
TEXT = "The harbour wakes before the town does. " * 20


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in fp32 and int4 for every device of a CPU."""
    folder = tmp_path_factory.mktemp("evaluated") / "tiny"
    for weights in ("fp32", "int4"):
        export(SyntheticCheckpoint("tiny"), folder, engines=EXPORTS, weights=weights)
    return folder


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("EDGE_GLM_HOME", str(tmp_path / "home"))
    return


def subject(package: Path, device: str, weights: str) -> Subject:
    store = Store(home_of())
    return Subject(store, place(store, Wish(str(package), device, weights)))  # type: ignore[arg-type]


@pytest.mark.parametrize("device", DEVICES)
def test_perplexity_is_what_the_runtime_scores(device: str, package: Path) -> None:
    with subject(package, device, "fp32") as model:
        found = evaluate(model, None, {"it": TEXT})
    with EdgeLLM(str(package), device, weights="fp32") as llm:
        scores = llm.score(llm.tokenizer.encode(TEXT))
    assert found.texts["it"].tokens == len(scores)
    assert found.texts["it"].nll == pytest.approx(-scores.mean(dtype=np.float64), rel=1e-4)
    assert found.overall == found.texts["it"]
    assert found.reference is None


def test_devices_agree_on_a_model_and_rounding_shows(package: Path) -> None:
    with subject(package, "onnxruntime:cpu", "fp32") as reference:
        with subject(package, "openvino:cpu", "fp32") as same:
            twin = evaluate(same, reference, {"a": TEXT, "b": "Another one, that is short."})
        with subject(package, "onnxruntime:cpu", "int4") as rounded:
            loss = evaluate(rounded, reference, {"a": TEXT})
    assert twin.overall.kl is not None
    assert loss.overall.kl is not None
    assert abs(twin.overall.kl) < 1e-6
    assert twin.overall.tokens == sum(each.tokens for each in twin.texts.values())
    assert loss.overall.kl > 100 * abs(twin.overall.kl)
    assert loss.overall.top1 is not None
    assert twin.overall.top1 is not None
    assert loss.overall.top1 < twin.overall.top1
    assert twin.texts["b"].divergence is None  # which is of answers, and there are none


def test_windows_of_a_text_that_is_longer_than_they_are(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_runtime.evaluation.evaluate.WINDOW", 50)
    with subject(package, "onnxruntime:cpu", "fp32") as model:
        ids = model.tokenizer.encode(TEXT)
        found = evaluate(model, model, {"it": TEXT}).overall
        expected = []
        for start in range(0, len(ids), 50):
            part = np.array(ids[start : start + 50], np.int64)
            if len(part) > 1:
                one = evaluate(model, None, {"part": model.tokenizer.decode(part.tolist())}).overall
                expected.append((one.nll, one.tokens))
    assert found.tokens == sum(count for _, count in expected)
    assert found.nll == pytest.approx(sum(nll * count for nll, count in expected) / found.tokens, rel=1e-3)
    assert found.kl == pytest.approx(0, abs=1e-9)


def test_greedy_is_the_likeliest_again_and_again(package: Path) -> None:
    with subject(package, "openvino:cpu", "fp32") as model:
        prompt = np.array(model.tokenizer.encode("The harbour"), np.int64)
        answer = model.greedy(prompt, 6)
        for count in range(6):
            so_far = np.array([*prompt, *answer[:count]], np.int64)
            (*_, rows) = model.logits(so_far, 256)
            assert rows[-1].argmax() == answer[count]


def test_other_vocabularies_are_refused(package: Path, tmp_path: Path, smollm2_gguf: Path) -> None:
    other = tmp_path / "other"
    export(open_checkpoint(smollm2_gguf), other, engines=["onnx"], weights="int4")
    with subject(package, "onnxruntime:cpu", "fp32") as model, subject(other, "onnxruntime:cpu", "int4") as reference:
        with pytest.raises(ConfigError, match="different vocabularies"):
            evaluate(model, reference, {"it": TEXT})
        with pytest.raises(ConfigError, match="needs two"):
            evaluate(model, None, {"it": ""})


def test_command_line(package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "mine.txt"
    text.write_text(TEXT)
    other = tmp_path / "other.txt"
    other.write_text("Quite another text.")
    common = ["eval", str(package), "--device", "onnxruntime:cpu", "--weights", "int4", "--text", str(text), str(other)]
    assert main([*common, "--reference", str(package), "--reference-weights", "fp32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["texts"]) == {"mine", "other"}
    assert set(found["overall"]) >= {"tokens", "perplexity", "kl", "top1", "top5", "divergence", "reference_perplexity"}
    assert math.isfinite(found["overall"]["kl"])
    assert main(common) == 0
    table = capsys.readouterr().out
    assert "perplexity" in table
    assert "KL" not in table
    assert main([*common, "--reference", str(package)]) == 0
    assert "greedy the same" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--text", "nowhere.txt"], "cannot read the text"),
        (["--reference-weights", "fp32"], "name one"),
        (["--reference", "nothing-of-this-name"], "nothing-of-this-name"),
    ],
)
def test_mistakes(options: list[str], words: str, package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(package), "--device", "onnxruntime:cpu", "--weights", "fp32", *options]) == 1
    assert words in capsys.readouterr().err


def test_the_texts_that_come_along_share_nothing() -> None:
    texts = [calibration_text(), *evaluation_texts().values()]
    sentences = [{line.strip() for line in text.replace("\n", " ").split(". ") if len(line) > 40} for text in texts]
    for first, own in enumerate(sentences):
        assert len(own) > 15
        for others in sentences[first + 1 :]:
            assert not own & others


def test_a_trimmed_model_beside_the_whole_one(package: Path, tmp_path: Path) -> None:
    """Told of its own tokens, the same network is the same; what it lacks, the reference is not asked about."""
    recipe = Recipe(prune=Prune(vocabulary="0" * 64))
    small = tmp_path / "small"
    words = Text("words", TEXT[: len(TEXT) // 3])
    source = SyntheticCheckpoint("tiny")
    export(source, small, engines=["onnx"], weights="fp32", shrinking=Shrinking(recipe, words, vocabulary=words))
    with subject(small, "onnxruntime:cpu", "fp32") as model, subject(package, "onnxruntime:cpu", "fp32") as reference:
        assert len(model.vocabulary) < len(reference.vocabulary)
        found = evaluate(model, reference, {"it": TEXT}).overall
        with pytest.raises(ConfigError, match="reference lacks"):
            evaluate(reference, model, {"it": TEXT})
    assert found.kl == pytest.approx(0, abs=1e-6)
    assert found.top1 == 1.0
