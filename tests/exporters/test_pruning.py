"""What is cut, what is refitted, and what engines compute from what is left."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from devices import DecoderOptions, Step, open_decoder
from edge_runtime.cli.main import main
from edge_runtime.cli.recipes import parse_prune
from edge_runtime.errors import ConfigError, CorruptModel, StorageError, UnsupportedModel
from edge_runtime.evaluation.metrics import Tally, log_softmax
from edge_runtime.package import Package, Weights
from edge_runtime.recipe import Prune, Recipe
from exporters.builder import Linear
from exporters.checkpoint import Checkpoint, TextFiles
from exporters.compression import latency
from exporters.compression.allocation import Option, solve
from exporters.compression.compress import Text, windows
from exporters.compression.cut import Cut, CutCheckpoint
from exporters.compression.latency import MeasuredCosts
from exporters.compression.numpy_network import Array, NumpyNetwork
from exporters.compression.prune import WeightCosts, neurons_left, prune
from exporters.compression.ranking import rank
from exporters.compression.repair import RIDGE, fit, repair
from exporters.compression.shrink import Shrinking, shrink
from exporters.compression.tensor_folder import TensorFolder
from exporters.compression.vocabulary import TrimmedCheckpoint, tokens_to_keep
from exporters.export import export
from exporters.hf_names import tensor_shape
from exporters.network import build, tensor_names
from exporters.quantize import QuantizedCheckpoint
from exporters.safetensors_checkpoint import SafetensorsCheckpoint
from exporters.weights import QuantizedTensor, Tensor, dequantize
from tests.conftest import EXPORTS
from tests.exporters.numpy_builder import run
from tests.exporters.random_checkpoint import RandomCheckpoint
from tests.exporters.test_compression import SHORT, TEXT, Spoken
from tests.exporters.test_families import FOLDER, MODELS

Logits = NDArray[np.float32]
RANDOM = np.random.default_rng(5)
IDS = RANDOM.integers(0, SHORT.vocab_size, 96)
FOUR = replace(SHORT, layers=SHORT.layers * 2)


def quiet(what: str, done: int, total: int) -> None:
    return


# --- ranking ----------------------------------------------------------------------------------------------------------


def test_losses_are_those_of_networks_without_the_part() -> None:
    """Each against a whole run of its own."""
    source = RandomCheckpoint(SHORT)
    ranking = rank(source, IDS)
    whole = run(source, IDS)
    for layer, group in itertools.product(range(2), range(2)):
        assert ranking.group_loss[layer][group] == pytest.approx(
            divergence(whole, run(_Mean(source, f"layers.{layer}.o", group), IDS)), rel=1e-3
        )
    for layer in range(2):
        without = CutCheckpoint(source, Cut(frozenset({layer})))
        assert ranking.layer_loss[layer] == pytest.approx(divergence(whole, run(without, IDS)), rel=1e-3)
        assert list(ranking.neuron_loss[layer]) == sorted(ranking.neuron_loss[layer])
    assert len(ranking.head_energy[0]) == SHORT.num_heads
    fluctuation, energy = np.array(ranking.head_fluctuation), np.array(ranking.head_energy)
    assert (fluctuation <= energy).all()


class _Mean(RandomCheckpoint):
    """Whose product ``name`` has the mean in the place of a group's heads."""

    def __init__(self, base: Checkpoint, name: str, group: int) -> None:
        super().__init__(replace(base.architecture, o_bias=True))
        width = SHORT.heads_per_group * SHORT.head_dim
        part = slice(group * width, (group + 1) * width)
        seen = _Inputs(IDS, name)
        build(base, seen)
        weight = dequantize(base.tensor(name)).copy()
        self._bias = {f"{name}.bias": weight[:, part] @ seen.inputs[:, part].mean(0)}
        weight[:, part] = 0
        self._base, self._changed = base, {name: weight}

    def tensor(self, name: str) -> Tensor:
        if name.endswith(".bias"):
            return self._bias.get(name, np.zeros(SHORT.hidden_size, np.float32))
        return self._changed[name] if name in self._changed else self._base.tensor(name)


class _Inputs(NumpyNetwork):
    def __init__(self, ids: NDArray[np.int64], name: str) -> None:
        super().__init__(ids[None])
        self._name = name

    def linear(self, x: Array, parts: Sequence[Linear], name: str) -> Array:
        if name == self._name:
            self.inputs = x
        return super().linear(x, parts, name)


def divergence(whole: Logits, other: Logits) -> float:
    p, q = log_softmax(whole), log_softmax(other)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


# --- where to cut -----------------------------------------------------------------------------------------------------


def test_the_solution_is_the_best_of_all() -> None:
    for _ in range(20):
        parts = [
            [Option(0, 0), *(Option(float(RANDOM.integers(1, 9)), float(RANDOM.random())) for _ in range(3))]
            for _ in range(4)
        ]
        wanted = 10.0
        every = list(itertools.product(*parts))
        possible = [each for each in every if sum(option.saved for option in each) >= wanted]
        if not possible:
            with pytest.raises(ValueError, match="do not save"):
                solve(parts, wanted)
            continue
        chosen = [part[number] for part, number in zip(parts, solve(parts, wanted), strict=True)]
        assert sum(option.saved for option in chosen) >= wanted
        best = min(sum(option.loss for option in each) for each in possible)
        assert sum(option.loss for option in chosen) == pytest.approx(best)
    assert solve(parts, 0) == [0] * 4


def test_all_that_there_is_can_be_wanted() -> None:
    parts = [[Option(0, 0), Option(1 / 3, 0.5)] for _ in range(7)]
    assert solve(parts, sum(part[1].saved for part in parts)) == [1] * 7
    assert sum(solve(parts, 1.0)) == 3


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        (Prune(layers=4), "leaves nothing"),
        (Prune(heads=0.9), "at most 0.500"),
        (Prune(mlp=0.95), "leaves too little"),
        (Prune(target="bytes", to=0.05), "cannot be reached"),
        (Prune(target="loss", to=1e-9), "less than any cut"),
    ],
)
def test_cuts_that_cannot_be(tmp_path: Path, wish: Prune, message: str) -> None:
    source = RandomCheckpoint(FOUR)
    with pytest.raises(ConfigError, match=message):
        prune(source, wish, IDS[None], tmp_path, WeightCosts(FOUR), quiet)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("heads=2", "at least 0 and below 1"),
        ("mlp=-1", "at least 0 and below 1"),
        ("layers=-1", "how many are cut"),
        ("layers=1.5", "whole number"),
        ("heads=a lot", "number, not 'a lot'"),
        ("tails=1", "none of heads"),
        ("heads", "NAME=VALUE"),
        ("heads=0.1,heads=0.2", "one too many"),
        ("bytes=0.5,loss=1", "one too many"),
        ("bytes=0.5,mlp=0.1", "leave heads and mlp out"),
        ("bytes=1.5", "between 0 and 1"),
        ("loss=0", "nats a token"),
        ("heads=0", "nothing is to be pruned"),
        ("repair=maybe", "yes or no"),
    ],
)
def test_what_the_command_line_refuses(words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_prune(words)


def test_shares_are_reached(tmp_path: Path) -> None:
    source = RandomCheckpoint(FOUR)
    made = prune(source, Prune(heads=0.25, mlp=0.25, layers=1), IDS[None], tmp_path, WeightCosts(FOUR), quiet)
    arch = made.checkpoint.architecture
    assert arch.num_layers == 3
    assert sum(arch.kv_heads(index) for index in range(3)) == 6 - round(0.25 * 6)
    assert sum(arch.inner(index) for index in range(3)) <= 0.75 * 3 * 128 + 32
    for name in tensor_names(arch):
        assert made.checkpoint.tensor(name).shape == tensor_shape(arch, name)


@pytest.mark.parametrize("share", [0.9, 0.7, 0.5])
def test_bytes_are_reached(tmp_path: Path, share: float) -> None:
    source, costs = RandomCheckpoint(FOUR), WeightCosts(FOUR)
    made = prune(source, Prune(target="bytes", to=share, repair=False), IDS[None], tmp_path, costs, quiet)

    def size(checkpoint: Checkpoint) -> int:
        shapes = (tensor_shape(checkpoint.architecture, name) for name in tensor_names(checkpoint.architecture))
        return sum(shape[0] * shape[1] for shape in shapes if len(shape) == 2)

    assert share - 0.12 < size(made.checkpoint) / size(source) < share + 0.01


def test_neurons_stay_in_multiples_of_32() -> None:
    assert [neurons_left(1536, cut) for cut in (0, 1, 7)] == [1536, 1344, 192]
    assert neurons_left(100, 4) == 64
    assert neurons_left(24, 4) == 12


# --- repair -----------------------------------------------------------------------------------------------------------


def test_a_fit_is_least_squares_around_the_weights() -> None:
    x, weight = RANDOM.standard_normal((200, 12), np.float32), RANDOM.standard_normal((5, 12), np.float32)
    target = RANDOM.standard_normal((200, 5), np.float32)
    fitted, bias = fit(x, target, weight)
    centred = x - x.mean(0)
    strength = RIDGE * (centred**2).sum() / 12
    # the ridge as further rows: (strength)^½ · (w − weight) = 0
    rows = np.concatenate([centred, np.sqrt(strength) * np.eye(12)])
    values = np.concatenate([target - target.mean(0), np.sqrt(strength) * weight.T])
    expected = np.linalg.lstsq(rows.astype(np.float64), values.astype(np.float64), rcond=None)[0].T
    np.testing.assert_allclose(fitted, expected, atol=1e-4)
    np.testing.assert_allclose(bias, target.mean(0) - expected @ x.mean(0), atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_repair_brings_every_family_nearer(name: str, tmp_path: Path) -> None:
    source = SafetensorsCheckpoint(FOLDER / name)
    arch = source.architecture
    ids = np.random.default_rng(2).integers(0, arch.vocab_size, (8, 48))
    layer = arch.num_layers - 2
    half = np.arange(0, arch.inner(layer), 2)
    groups = {layer: tuple(range(arch.kv_heads(layer) - 1))} if arch.kv_heads(layer) > 1 else {}
    cut = Cut(groups=groups, neurons={layer: half})
    fitted = TensorFolder(tmp_path)
    repair(source, cut, ids, fitted)
    states = [run(CutCheckpoint(source, cut, *more), ids[0]) for more in ((), (fitted,))]
    whole = run(source, ids[0])
    before, after = (float(((each - whole) ** 2).mean()) for each in states)
    assert after < before


def test_a_cut_alone_is_a_smaller_network(tmp_path: Path) -> None:
    """The same as zeros in the places of what is cut."""
    source = RandomCheckpoint(SHORT)
    kept = np.setdiff1d(np.arange(128), np.arange(32, 64))
    cut = CutCheckpoint(source, Cut(groups={1: (1,)}, neurons={0: kept}))

    class Zeroed(RandomCheckpoint):
        def tensor(self, name: str) -> Tensor:
            values = np.array(super().tensor(name))
            if name == "layers.1.o":
                values[:, :32] = 0
            if name == "layers.0.down":
                values[:, 32:64] = 0
            return values

    np.testing.assert_allclose(run(cut, IDS), run(Zeroed(SHORT), IDS), rtol=1e-5, atol=1e-5)


def test_codes_stay_codes_where_groups_are_whole() -> None:
    source = QuantizedCheckpoint(RandomCheckpoint(SHORT), "int4")
    whole = CutCheckpoint(source, Cut(groups={0: (1,)}, neurons={0: np.arange(64)}))
    for name in ("q", "k", "v", "o", "gate", "up", "down"):
        assert isinstance(whole.tensor(f"layers.0.{name}"), QuantizedTensor), name
    odd = CutCheckpoint(source, Cut(neurons={0: np.arange(0, 128, 2)}))
    assert isinstance(odd.tensor("layers.0.down"), np.ndarray)
    expected = dequantize(source.tensor("layers.0.down"))[:, ::2]
    np.testing.assert_array_equal(odd.tensor("layers.0.down"), expected)


# --- vocabulary -------------------------------------------------------------------------------------------------------


class Trained(RandomCheckpoint):
    """With a tokenizer that merges."""

    @property
    def text(self) -> TextFiles:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
        more = "Where the wild wind winds, there wanders whoever whispers. " * 30 + "λ " * 30
        tokenizer.train_from_iterator([TEXT.text, more], trainer)
        tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
        end = tokenizer.token_to_id("<|end|>")
        return TextFiles(
            tokenizer.to_str(),
            special_tokens={"eos_token": "<|end|>"},
            generation={"eos_token_id": [end], "temperature": 0.5},
        )


WORDY = replace(SHORT, vocab_size=512)


def test_a_trimmed_vocabulary_says_the_same(tmp_path: Path) -> None:
    source = Trained(WORDY)
    whole = Tokenizer.from_str(source.text.tokenizer_json)
    trimmed = TrimmedCheckpoint(source, tokens_to_keep(source, [TEXT.text]))
    tokenizer = Tokenizer.from_str(trimmed.text.tokenizer_json)
    assert trimmed.architecture.vocab_size == tokenizer.get_vocab_size() < whole.get_vocab_size()
    inside = TEXT.text[:60]
    assert tokenizer.encode(inside).tokens == whole.encode(inside).tokens
    for outside in ("whoever wanders", "Größe 漢字 🙂", "\x00\n\t", "<|end|>"):
        assert tokenizer.decode(tokenizer.encode(outside).ids, skip_special_tokens=False) == outside
    assert trimmed.text.generation == {"eos_token_id": [tokenizer.token_to_id("<|end|>")], "temperature": 0.5}
    ids = np.array(tokenizer.encode(inside).ids)
    np.testing.assert_allclose(run(trimmed, ids), run(source, trimmed.kept[ids])[:, trimmed.kept], rtol=1e-5, atol=1e-5)


def test_unigram_vocabularies_are_trimmed(tmp_path: Path) -> None:
    pieces = [("<unk>", 0.0), *((chr(97 + n), -9.0) for n in range(26)), ("▁", -3.0), ("▁sea", -2.0), ("▁see", -2.0)]
    content = json.loads(Tokenizer.from_str(_unigram(pieces)).to_str())

    class Uni(RandomCheckpoint):
        @property
        def text(self) -> TextFiles:
            return TextFiles(json.dumps(content))

    source = Uni(replace(SHORT, vocab_size=64))
    trimmed = TrimmedCheckpoint(source, tokens_to_keep(source, ["sea"]))
    tokenizer = Tokenizer.from_str(trimmed.text.tokenizer_json)
    assert "▁sea" in tokenizer.get_vocab()
    assert "▁see" not in tokenizer.get_vocab()
    assert tokenizer.encode("see").tokens == ["▁", "s", "e", "e"]


def _unigram(pieces: list[tuple[str, float]]) -> str:
    tokenizer = Tokenizer(models.Unigram(pieces, 0, False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer.to_str()


def test_a_script_is_kept() -> None:
    source = Trained(WORDY)
    both = Tokenizer.from_str(source.text.tokenizer_json)
    assert both.encode("λ").tokens == ["Î»"]  # its two bytes, in the alphabet of bytes
    trimmed = TrimmedCheckpoint(source, tokens_to_keep(source, [], "latin"))
    tokenizer = Tokenizer.from_str(trimmed.text.tokenizer_json)
    assert "Î»" not in tokenizer.get_vocab()
    assert tokenizer.decode(tokenizer.encode("λ, whoever").ids) == "λ, whoever"
    assert tokenizer.encode("whoever wanders").tokens == both.encode("whoever wanders").tokens
    with pytest.raises(ConfigError, match="klingon"):
        tokens_to_keep(source, [], "klingon")
    assert parse_prune("vocab=script:latin")[0].script == "latin"


def test_vocabularies_that_cannot_be_trimmed() -> None:
    class Words(RandomCheckpoint):
        @property
        def text(self) -> TextFiles:
            model = {"type": "WordLevel", "vocab": {"a": 0, "[UNK]": 1}, "unk_token": "[UNK]"}
            return TextFiles(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))

    class Lacking(Trained):
        @property
        def text(self) -> TextFiles:
            return replace(super().text, special_tokens={"eos_token": "<|never|>"})

    with pytest.raises(UnsupportedModel, match="WordLevel"):
        tokens_to_keep(Words(SHORT), ["a"])
    with pytest.raises(CorruptModel, match="never"):
        tokens_to_keep(Lacking(WORDY), ["a"])
    with pytest.raises(ConfigError, match="empty"):
        tokens_to_keep(Trained(WORDY), [" \n"])


# --- packages ---------------------------------------------------------------------------------------------------------


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
    assert sorted(arch.kv_heads) == [1, 1, 2] or not arch.kv_heads
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
