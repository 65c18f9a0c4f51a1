"""Sentence encoders: from a folder to vectors, on both engines, against the network in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from devices.encoder import EncoderSpec, open_encoder
from edge_runtime.embedder import EdgeEmbedder, _batches, needed_bytes
from edge_runtime.errors import (
    BudgetError,
    ConfigError,
    CorruptModel,
    DeviceUnavailable,
    EngineStopped,
    InvalidRequest,
    PromptTooLong,
    UnsupportedModel,
)
from edge_runtime.exporting import export_package
from edge_runtime.llm import EdgeLLM
from edge_runtime.package import Package
from tests.exporters.encoder_folder import HIDDEN, POSITIONS, WORDS, embedded, write_folder

TEXTS = ["the cat sat on a mat", "dog", "the dog ran", "a cat"]


def ids_of(text: str) -> list[int]:
    return [2, *(WORDS.index(word) for word in text.split()), 3]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGE_GLM_HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.mark.parametrize("device", ["onnxruntime:cpu", "openvino:cpu"])
@pytest.mark.parametrize(
    ("pooling", "normalize", "family", "prefix"),
    [
        ("mean_tokens", True, "bert", ""),
        ("cls_token", False, "bert", "bert."),
        ("max_tokens", True, "bert", ""),
        ("mean_tokens", False, "roberta", "roberta."),
        ("cls_token", True, "xlm-roberta", ""),
    ],
)
def test_vectors_are_those_of_the_network(
    home: Path, device: str, pooling: str, normalize: bool, family: str, prefix: str
) -> None:
    tensors = write_folder(home / "m", family, pooling, normalize, prefix)
    first = 0 if family == "bert" else 2
    for weights, near in (("fp32", 1e-5), ("fp16", 3e-3)):
        with EdgeEmbedder(str(home / "m"), device, weights=weights) as model:  # type: ignore[arg-type]
            assert model.device == device
            found = model.embed(TEXTS)
        assert found.tokens == sum(len(ids_of(text)) for text in TEXTS)
        for text, vector in zip(TEXTS, found.vectors, strict=True):
            expected = embedded(tensors, ids_of(text), pooling, normalize, first)
            np.testing.assert_allclose(vector, expected, atol=near, rtol=0)


def test_a_bare_model_gives_the_mean_as_it_is(home: Path) -> None:
    tensors = write_folder(home / "m", pooling=None)
    with EdgeEmbedder(str(home / "m")) as model:
        expected = embedded(tensors, ids_of("the cat"), "mean_tokens", False)
        np.testing.assert_allclose(model.embed("the cat").vectors[0], expected, atol=1e-5, rtol=0)


def test_company_and_padding_change_nothing(home: Path) -> None:
    write_folder(home / "m")
    rng = np.random.default_rng(3)
    texts = [" ".join(rng.choice(WORDS[4:], rng.integers(1, 30)).tolist()) for _ in range(90)]
    with EdgeEmbedder(str(home / "m")) as model:
        together = model.embed(texts).vectors
        alone = np.stack([model.embed(text).vectors[0] for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-6, rtol=0)


def test_batches_hold_every_text_once_and_keep_their_limits() -> None:
    rng = np.random.default_rng(5)
    lengths = rng.integers(1, 513, 300).tolist()
    batches = list(_batches(lengths))
    assert sorted(index for batch in batches for index in batch) == list(range(300))
    for batch in batches:
        assert len(batch) <= 32
        assert len(batch) * max(lengths[index] for index in batch) <= 4096


def test_ids_and_too_long_texts(home: Path) -> None:
    write_folder(home / "m")
    long = " ".join(["cat"] * 60)
    with EdgeEmbedder(str(home / "m")) as model:
        np.testing.assert_array_equal(model.embed([ids_of("the cat")]).vectors, model.embed("the cat").vectors)
        with pytest.raises(PromptTooLong, match=rf"input\[1\] has 62 tokens; this model takes {POSITIONS}"):
            model.embed(["cat", long])
        cut = model.embed(long, truncate=True)
        assert cut.tokens == POSITIONS
        whole = model.embed([[2, *[5] * (POSITIONS - 2), 3]])  # the mark at the end stays
        np.testing.assert_array_equal(cut.vectors, whole.vectors)
        for wrong in ([], [""], ["cat", " \n"], [[]], [[-1]], [[len(WORDS)]]):
            with pytest.raises(InvalidRequest):
                model.embed(wrong)
        asked = iter([True, False])
        with pytest.raises(EngineStopped, match="not wanted"):
            model.embed(["cat"] * 100, wanted=lambda: next(asked))
        assert model.embed("[SEP] cat").tokens > 4  # text that names a mark is text
    with pytest.raises(EngineStopped, match="closed"):
        model.embed("cat")
    model.close()


def test_a_text_of_one_kind_of_model_is_not_the_others(home: Path) -> None:
    write_folder(home / "m")
    package = export_package(str(home / "m"), home / "p", ["onnxruntime", "openvino", "onnxruntime-edge"], None)
    assert [variant.name for variant in package.manifest.variants] == ["onnx-fp32", "openvino-fp32"]
    assert package.manifest.encoder is not None
    with EdgeEmbedder(str(home / "p")) as model:
        assert model.model_id == "p"
        assert model.facts.family == "bert"
    for ref in (home / "p", home / "m"):
        with pytest.raises((ConfigError, UnsupportedModel), match="makes embeddings, no text"):
            EdgeLLM(str(ref))
    with pytest.raises(ConfigError, match="makes text, not embeddings"):
        EdgeEmbedder("synthetic:tiny")
    with pytest.raises(DeviceUnavailable, match="encoders run on"):
        EdgeEmbedder(str(home / "p"), "cuda")
    with pytest.raises(UnsupportedModel, match="fp32 or fp16"):
        export_package(str(home / "m"), home / "q", ["onnxruntime"], "int4")
    assert not (home / "q").exists()


def test_budgets(home: Path) -> None:
    write_folder(home / "m")
    package = export_package(str(home / "m"), home / "p", ["onnxruntime"], None)
    needed = needed_bytes(package, package.manifest.variants[0])
    with pytest.raises(BudgetError, match="needs up to"):
        EdgeEmbedder(str(home / "p"), memory_budget=needed - 1)
    EdgeEmbedder(str(home / "p"), memory_budget=needed).close()


def without(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors")


def changed(folder: Path, name: str, value: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, name: value}, folder / "model.safetensors")


def _pooling_at(path: str) -> Any:
    listed = [{"type": "x.Transformer", "path": ""}, {"type": "x.Pooling", "path": path}]
    return lambda folder: (folder / "modules.json").write_text(json.dumps(listed))


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (lambda f: without(f, "encoder.layer.1.output.dense.bias"), CorruptModel, "output.dense.bias is missing"),
        (lambda f: without(f, "embeddings.word_embeddings.weight"), CorruptModel, "word_embeddings.weight is missing"),
        (
            lambda f: changed(f, "embeddings.LayerNorm.bias", np.zeros(3, np.float32)),
            CorruptModel,
            r"has shape \(3,\)",
        ),
        (
            lambda f: changed(f, "embeddings.LayerNorm.bias", np.full(HIDDEN, np.nan, np.float32)),
            CorruptModel,
            "not finite",
        ),
        (lambda f: (f / "model.safetensors").write_bytes(b"x"), CorruptModel, "not a safetensors file"),
        (lambda f: (f / "model.safetensors").unlink(), UnsupportedModel, "no .safetensors"),
        (lambda f: (f / "tokenizer.json").unlink(), UnsupportedModel, "no tokenizer.json"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), CorruptModel, "is not a tokenizer"),
        (lambda f: (f / "modules.json").write_text("[3]"), CorruptModel, "sentence-transformers"),
        (
            lambda f: (f / "modules.json").write_text('[{"type": "a.Pooling", "path": "../elsewhere"}]'),
            CorruptModel,
            "leads out of the folder",
        ),
        (
            lambda f: (f / "modules.json").write_text(json.dumps([{"type": "x.Dense", "path": ""}])),
            UnsupportedModel,
            "Dense is not supported",
        ),
        *(
            (_pooling_at(path), CorruptModel, "leads out of the folder")
            for path in ("../other", "/etc", "1_Pooling/../../other", "C:\\other")
        ),
    ],
)
def test_broken_folders(home: Path, spoil: Any, error: type[Exception], words: str) -> None:
    write_folder(home / "m")
    spoil(home / "m")
    with pytest.raises(error, match=words):
        export_package(str(home / "m"), home / "p", ["onnxruntime"], None)
    assert not (home / "p").exists()


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        ({"hidden_act": "swish"}, UnsupportedModel, "swish"),
        ({"position_embedding_type": "relative_key"}, UnsupportedModel, "absolute"),
        ({"hidden_size": "x"}, CorruptModel, "hidden_size must be an integer"),
        ({"hidden_act": {}}, CorruptModel, "hidden_act must be a string"),
        ({"num_hidden_layers": 10**9}, CorruptModel, "num_hidden_layers must be an integer from 1 to 10000"),
        ({"layer_norm_eps": 10**400}, CorruptModel, "layer_norm_eps must be a finite number"),
        ({"num_attention_heads": 3}, CorruptModel, "make no encoder"),
        ({"vocab_size": 5}, CorruptModel, r"config.json makes it \(5, 16\)"),
    ],
)
def test_configurations_that_make_no_encoder(
    home: Path, config: dict[str, Any], error: type[Exception], words: str
) -> None:
    write_folder(home / "m", **config)
    with pytest.raises(error, match=words):
        export_package(str(home / "m"), home / "p", ["onnxruntime"], None)


def test_pooling_that_is_not_known(home: Path) -> None:
    write_folder(home / "m", pooling="weightedmean_tokens")
    with pytest.raises(UnsupportedModel, match="weightedmean_tokens is not supported"):
        export_package(str(home / "m"), home / "p", ["onnxruntime"], None)


def test_the_device_layer_checks_what_it_gets(home: Path) -> None:
    write_folder(home / "m")
    package: Package = export_package(str(home / "m"), home / "p", ["onnxruntime"], None)
    model = package.folder / package.manifest.variants[0].model
    encoder = open_encoder(EncoderSpec(model, HIDDEN, POSITIONS, len(WORDS), 0), "onnxruntime:cpu")
    assert encoder.embed([]).shape == (0, HIDDEN)
    for wrong in ([[]], [[1] * (POSITIONS + 1)], [[-1]], [[len(WORDS)]]):
        with pytest.raises(ValueError, match="token"):
            encoder.embed(wrong)
    encoder.close()
    encoder.close()
