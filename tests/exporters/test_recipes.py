"""Packages made by a recipe: what engines compute from them, what they say of themselves, and what is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from devices import DecoderOptions, Step, open_decoder
from edge_runtime.cli.main import main
from edge_runtime.errors import ConfigError, CorruptModel, StorageError
from edge_runtime.evaluation.metrics import Tally
from edge_runtime.package import Package
from edge_runtime.recipe import Recipe
from exporters.compression.compress import compress
from exporters.compression.shrink import Shrinking, Shrunk, shrink
from exporters.compression.tensor_folder import TensorFolder
from exporters.export import export
from exporters.npu_weights import NpuCheckpoint
from exporters.synthetic import SyntheticCheckpoint
from exporters.weights import QuantizedTensor, Tensor
from tests.conftest import EXPORTS
from tests.exporters.numpy_builder import run
from tests.exporters.random_checkpoint import FRAGILE, SHORT, TEXT, Fragile, Spoken


def test_a_package_made_by_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its engines compute what numpy does with the same tensors."""
    source = SyntheticCheckpoint("tiny")
    shrinking = Shrinking(Recipe(method="awq+gptq", group=64), TEXT, [TEXT], Tally)
    folder, tensors = tmp_path / "made", tmp_path / "tensors"
    export(source, folder, engines=EXPORTS, weights="int4", shrinking=shrinking)
    tensors.mkdir()
    made, compression = shrink(source, shrinking, "int4", tensors)
    ids = np.arange(40, dtype=np.int64) + 60
    expected = run(made, ids)[-1]
    package = Package.open(folder)
    for variant, device in zip(package.manifest.variants, ("edge:cpu", "onnxruntime:cpu", "openvino:cpu"), strict=True):
        assert variant.compression == compression
        decoder = open_decoder(package.spec(variant), device, DecoderOptions(max_sequences=1))
        (found,) = decoder.forward([Step(decoder.new_sequence(), ids)])
        decoder.close()
        assert np.corrcoef(found[0], expected)[0, 1] > 0.995
    assert main(["show", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "awq+gptq, groups of 64" in shown
    assert "KL" in shown
    with pytest.raises(StorageError, match="another recipe"):
        export(source, folder, engines=["openvino-npu"], weights="int4")
    with pytest.raises(ConfigError, match="int4 weights"):
        export(source, folder, engines=["onnx"], weights="int8", shrinking=shrinking)


def test_each_engine_has_the_levels_that_it_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """4, 8 and 16 bits side by side where float16 pays, and 4 and 8 elsewhere; all compute what numpy does."""
    source = Fragile(SyntheticCheckpoint("tiny"))
    shrinking = Shrinking(Recipe(method="gptq", bits=8.75), TEXT, [TEXT], Tally)
    folder, tensors = tmp_path / "made", tmp_path / "tensors"
    export(source, folder, engines=EXPORTS, weights="int4", shrinking=shrinking)
    tensors.mkdir()
    shrunk = Shrunk(source, shrinking, "int4", tensors)
    ids = np.arange(40, dtype=np.int64) + 60
    plain = run(source, ids)[-1]
    package = Package.open(folder)
    errors = {}
    for variant in package.manifest.variants:
        device = {"onnxruntime-edge": "edge:cpu", "onnxruntime": "onnxruntime:cpu", "openvino": "openvino:cpu"}
        made, compression = shrunk.rounded((4, 8, 16) if variant.engine == "onnxruntime-edge" else (4, 8))
        assert variant.compression == compression
        expected = run(made, ids)[-1]
        decoder = open_decoder(package.spec(variant), device[variant.engine], DecoderOptions(max_sequences=1))
        (found,) = decoder.forward([Step(decoder.new_sequence(), ids)])
        decoder.close()
        assert np.corrcoef(found[0], expected)[0, 1] > 0.995
        errors[variant.engine] = np.abs(found[0] - plain).mean()
        assert (FRAGILE in compression.half) == (variant.engine == "onnxruntime-edge")
        assert compression.bits <= 8.75
    edge = next(each.compression for each in package.manifest.variants if each.engine == "onnxruntime-edge")
    assert edge is not None
    assert edge.wide
    assert errors["onnxruntime-edge"] < 0.3 * errors["onnxruntime"]
    assert main(["show", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert f"{len(edge.wide)} matrices of 8, {len(edge.half)} matrices of 16, by" in shown
    with pytest.raises(ConfigError, match="onnx-coreml does not take"):
        export(source, tmp_path / "other", engines=["onnx-coreml"], weights="int4", shrinking=shrinking)


def test_activations_of_16_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The weights are those of any int4 export."""
    plain, precise = tmp_path / "plain", tmp_path / "precise"
    source = ["export", "synthetic:tiny", "--engine"]
    assert main([*source, "onnx-edge", "-o", str(plain)]) == 0
    assert main([*source, "onnx-edge", "--activation-bits", "16", "-o", str(precise)]) == 0
    assert "activations of 16 bits" in capsys.readouterr().out
    assert main(["show", str(precise)]) == 0
    assert "activations of 16 bits" in capsys.readouterr().out
    weights = [(each / "onnx-edge-int4" / "model.onnx.data").read_bytes() for each in (plain, precise)]
    assert weights[0] == weights[1]
    rest = ["--activation-bits", "16", "-o", str(tmp_path / "none")]
    for engine in ("onnx", "all"):
        assert main([*source, engine, *rest]) == 1
        assert "add --engine onnx-edge" in capsys.readouterr().err
    assert main([*source, "onnx-edge", "--weights", "int8", *rest]) == 1
    assert "is for int4 weights" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_npus_have_a_form_of_their_own(tmp_path: Path) -> None:
    wide = Spoken(replace(SHORT, vocab_size=512, hidden_size=128))
    made, _ = compress(wide, Recipe(method="gptq", group=128, symmetric=True), TEXT, tmp_path)
    there = NpuCheckpoint(made, "int4")
    for name in ("layers.0.q", "layers.1.down", "layers.0.gate"):
        ours, theirs = made.tensor(name), there.tensor(name)
        assert isinstance(ours, QuantizedTensor)
        assert isinstance(theirs, QuantizedTensor)
        np.testing.assert_array_equal(ours.codes, theirs.codes)
        np.testing.assert_array_equal(ours.scale, theirs.scale)
    for recipe in (Recipe(method="gptq"), Recipe(group=128), Recipe(group=128, symmetric=True, bits=5)):
        with pytest.raises(ConfigError, match="--group 128 --symmetric"):
            export(wide, tmp_path / "npu", engines=["openvino-npu"], shrinking=Shrinking(recipe, TEXT))


def test_a_run_that_breaks_off_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: TensorFolder, name: str, tensor: Tensor) -> None:
        raise StorageError("no space left on device")

    monkeypatch.setattr(TensorFolder, "__setitem__", full)
    with pytest.raises(StorageError, match="no space"):
        export(
            SyntheticCheckpoint("tiny"),
            tmp_path / "made",
            engines=["onnx"],
            shrinking=Shrinking(Recipe(method="gptq"), TEXT),
        )
    assert [path for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == []


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_GLM_HOME", str(tmp_path / "home"))
    text = tmp_path / "mine.txt"
    text.write_text(TEXT.text)
    out = ["export", "synthetic:tiny", "-o", str(tmp_path / "made"), "--engine", "onnx"]
    assert main([*out, "--calibrate", str(text)]) == 1
    assert "add --method" in capsys.readouterr().err
    assert main([*out, "--prune", "vocab=script:latin", "--calibrate", str(text)]) == 1
    assert "with more than vocab=" in capsys.readouterr().err
    assert main([*out, "--method", "gptq", "--group", "48"]) == 1
    assert "not 48" in capsys.readouterr().err
    assert not (tmp_path / "made").exists()
    assert main([*out, "--method", "gptq", "--group", "64", "--bits", "8", "--calibrate", str(text)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("made: ")
    assert "mine.txt" in said
    assert Package.open(tmp_path / "made").name == "made"
    assert main(["show", str(tmp_path / "made"), "--json"]) == 0
    (variant,) = json.loads(capsys.readouterr().out)["variants"]
    assert variant["compression"]["recipe"] == {"method": "gptq", "group": 64, "bits": 8.0}
    assert variant["compression"]["calibration"]["name"] == "mine.txt"
    assert 0 < variant["compression"]["quality"]["top1"] <= 1


def test_a_recipe_that_cannot_be_is_a_corrupt_manifest(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    export(SyntheticCheckpoint("tiny"), folder, engines=["onnx"], shrinking=Shrinking(Recipe(group=64)))
    manifest = folder / "edge_glm.json"
    manifest.write_text(re.sub(r'"group": ?64', '"group": 48', manifest.read_text()))
    with pytest.raises(CorruptModel, match="not 48"):
        Package.open(folder)
