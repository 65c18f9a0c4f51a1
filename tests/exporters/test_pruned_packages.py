"""Packages of pruned models: what engines compute from what is left, and what is said and refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from devices import DecoderOptions, Step, open_decoder
from edge_runtime.cli.main import main
from edge_runtime.errors import ConfigError, StorageError
from edge_runtime.evaluation.metrics import Tally
from edge_runtime.package import Package, Weights
from edge_runtime.recipe import Prune, Recipe
from exporters.checkpoint import Checkpoint
from exporters.compression import latency
from exporters.compression.compress import Text, windows
from exporters.compression.latency import MeasuredCosts
from exporters.compression.prune import prune
from exporters.compression.shrink import Shrinking, shrink
from exporters.export import export
from exporters.quantize import QuantizedCheckpoint
from tests.conftest import EXPORTS
from tests.exporters.numpy_builder import run
from tests.exporters.random_checkpoint import SHORT, TEXT, Spoken
from tests.exporters.test_pruning import FOUR, quiet
from tests.exporters.test_vocabulary_trimming import WORDY, Trained


@pytest.mark.parametrize(("weights", "bits"), [("fp32", 32), ("fp16", 16), ("int8", 8.5)])
def test_bits_of_formats(tmp_path: Path, weights: Weights, bits: float) -> None:
    shrinking = Shrinking(Recipe(prune=Prune(layers=1)), TEXT)
    _, made = shrink(Spoken(replace(SHORT, vocab_size=512)), shrinking, weights, tmp_path)
    assert made.bits == bits


@pytest.mark.parametrize("weights", ["fp32", "int8", "int4"])
def test_engines_compute_what_is_left(tmp_path: Path, weights: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Layers of different shapes, biases where there were none, and tokens with new numbers."""
    source = Trained(replace(WORDY, layers=SHORT.layers * 2))
    recipe = Recipe(prune=Prune(heads=0.25, mlp=0.25, layers=1, vocabulary="0" * 64))
    shrinking = Shrinking(recipe, TEXT, [TEXT], Tally, TEXT)
    folder, tensors = tmp_path / "made", tmp_path / "tensors"
    export(source, folder, engines=EXPORTS, weights=weights, shrinking=shrinking)  # type: ignore[arg-type]
    tensors.mkdir()
    made, compression = shrink(source, shrinking, weights, tensors)  # type: ignore[arg-type]
    package = Package.open(folder)
    arch = package.manifest.architecture
    assert arch.num_layers == 3
    assert arch.vocab_size == compression.pruned.vocabulary < 512  # type: ignore[union-attr]
    assert sorted(arch.kv_heads) == [1, 1, 2]
    ids = np.arange(40, dtype=np.int64) + 60
    expected = run(QuantizedCheckpoint(made, weights), ids)[-1]
    for variant, device in zip(package.manifest.variants, ("edge:cpu", "onnxruntime:cpu", "openvino:cpu"), strict=True):
        assert variant.compression == compression
        decoder = open_decoder(package.spec(variant), device, DecoderOptions(max_sequences=2))
        first = decoder.new_sequence()
        decoder.forward([Step(first, ids[:-1])])
        second = first.fork(len(ids) - 1)
        found = decoder.forward([Step(first, ids[-1:]), Step(second, ids[-1:])])
        decoder.close()
        for each in found:
            assert np.corrcoef(each[0], expected)[0, 1] > (0.99 if weights == "int4" else 0.999), device
    assert main(["show", str(folder)]) == 0
    shown = capsys.readouterr().out
    for words in ("without layers", "KV groups", "tokens", "before", "after", "top-1"):
        assert words in shown
    learned = {line.split()[0] for line in shown.splitlines() if " tokens of " in line}
    assert learned == {"pruned"}  # nothing is learned for rounding to nearest
    page = tmp_path / "report.html"
    assert main(["show", str(folder), "--html", str(page)]) == 0
    assert page.read_text().count("<svg") == 6
    with pytest.raises(StorageError, match="another recipe"):
        export(source, folder, engines=["openvino"], weights="fp16")


def test_variants_of_a_package_are_cut_alike(tmp_path: Path) -> None:
    source, recipe = Spoken(replace(FOUR, vocab_size=512)), Recipe(prune=Prune(mlp=0.25))
    folder, other = tmp_path / "made", Text("other", "Iron rusts where salt water dries; paint it twice a year. " * 20)
    export(source, folder, engines=["onnx"], weights="int8", shrinking=Shrinking(recipe, TEXT, [TEXT], Tally))
    export(source, folder, engines=["openvino"], weights="int8", shrinking=Shrinking(recipe, TEXT, [TEXT], Tally))
    assert len(Package.open(folder).manifest.variants) == 2
    with pytest.raises(StorageError, match="cut otherwise"):
        export(source, folder, engines=["onnx"], weights="fp32", shrinking=Shrinking(recipe, other, [TEXT], Tally))
    assert len(Package.open(folder).manifest.variants) == 2


@pytest.mark.parametrize("wish", [Prune(heads=0.25), Prune(target="bytes", to=0.8)])
def test_heads_are_not_cut_for_cuda_and_no_work_is_begun(tmp_path: Path, wish: Prune) -> None:
    steps: list[str] = []
    with pytest.raises(ConfigError, match=r"as many heads in every layer.*for onnx-cuda"):
        export(
            Spoken(replace(FOUR, vocab_size=512)),
            tmp_path / "made",
            ["onnx", "onnx-cuda"],
            "fp16",
            lambda what, done, total: steps.append(what),
            shrinking=Shrinking(Recipe(prune=wish), TEXT),
        )
    assert steps == []
    assert list(tmp_path.iterdir()) == []


def test_neurons_are_cut_for_cuda(tmp_path: Path) -> None:
    shrinking = Shrinking(Recipe(prune=Prune(mlp=0.25)), TEXT)
    export(Spoken(replace(FOUR, vocab_size=512)), tmp_path / "made", ["onnx-cuda"], "fp16", shrinking=shrinking)
    assert [each.name for each in Package.open(tmp_path / "made").manifest.variants] == ["onnx-cuda-fp16"]


class _Clock(latency._Timing):
    """Each shape is run, and takes what is said here."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._seconds: list[float] = []

    def add(self, source: Checkpoint, layers: int, kv_heads: int, inner: int, *more: Any, trimmed: bool = True) -> int:
        self._seconds.append(layers * (0.1 * kv_heads + inner / 4096) + (0.0 if trimmed else 0.5))
        return super().add(source, layers, kv_heads, inner, *more, trimmed=trimmed)

    def run(self) -> Sequence[float]:
        assert all(each > 0 for each in super().run())
        return self._seconds


def test_the_latency_of_shapes_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is saved by it is what the solution counts with."""
    monkeypatch.setattr(latency, "_Timing", _Clock)
    source = Spoken(replace(FOUR, hidden_size=128, intermediate_size=4096, vocab_size=512))
    costs = MeasuredCosts(source, "onnx", "fp32")
    assert costs.rest() == pytest.approx(0.5)
    assert costs.attention(2) - costs.attention(1) == pytest.approx(0.1)
    for low, high in ((256, 512), (512, 2048), (2048, 3000), (3000, 4096)):
        assert costs.mlp(high) - costs.mlp(low) == pytest.approx((high - low) / 4096)
    ids, _ = windows(source, TEXT)
    made = prune(source, Prune(target="latency", to=0.8, repair=False), ids, tmp_path, costs, quiet)
    arch = made.checkpoint.architecture

    def taken(inner: Sequence[int], kv_heads: Sequence[int]) -> float:
        return costs.rest() + sum(map(costs.mlp, inner)) + sum(map(costs.attention, kv_heads))

    whole = taken([4096] * 4, [2] * 4)
    left = taken([arch.inner(index) for index in range(4)], [arch.kv_heads(index) for index in range(4)])
    assert 0.7 < left / whole < 0.81


def test_texts_that_are_too_short(tmp_path: Path) -> None:
    for text in ("", "a"):
        shrinking = Shrinking(Recipe(prune=Prune(mlp=0.25)), Text("short.txt", text))
        with pytest.raises(ConfigError, match=r"short\.txt has \d tokens"):
            export(Spoken(replace(SHORT, vocab_size=512)), tmp_path / "made", engines=["onnx"], shrinking=shrinking)
    assert list(tmp_path.iterdir()) == [tmp_path / ".made.lock"] or not list(tmp_path.iterdir())


def test_an_interrupted_repair_leaves_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("exporters.compression.prune.repair", full)
    shrinking = Shrinking(Recipe(prune=Prune(mlp=0.25)), TEXT)
    with pytest.raises(StorageError, match="No space left"):
        export(Spoken(replace(SHORT, vocab_size=512)), tmp_path / "made", engines=["onnx"], shrinking=shrinking)
    assert not (tmp_path / "made").exists()
