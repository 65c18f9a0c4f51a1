"""EdgeLLM: one small model on both engines, through every way of asking it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

import edge_runtime
from edge_runtime import Chunk, Completion, EdgeLLM, Grammar, SamplingParams
from edge_runtime.errors import (
    BudgetError,
    ConfigError,
    CorruptModel,
    DeviceUnavailable,
    EngineStopped,
    InvalidRequest,
    PromptTooLong,
    TemplateError,
    UnknownDevice,
    UnknownReference,
)
from edge_runtime.footprint import Model, Use, footprint
from edge_runtime.package import Package, Variant
from exporters.checkpoint import TextFiles
from exporters.export import export
from exporters.synthetic import SyntheticCheckpoint

GREEDY = SamplingParams(temperature=0, max_tokens=8)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGE_GLM_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module", params=["openvino:cpu", "onnxruntime:cpu"])
def llm(request: pytest.FixtureRequest, home: Path) -> Iterator[EdgeLLM]:
    with EdgeLLM("synthetic:tiny", request.param, weights="fp32", threads=1) as model:
        assert model.device == request.param
        yield model


def test_surface() -> None:
    assert edge_runtime.__version__
    assert set(edge_runtime.__all__) >= {"EdgeLLM", "SamplingParams", "Completion", "Chunk", "EdgeError"}
    with pytest.raises(AttributeError, match="Nothing"):
        edge_runtime.Nothing  # noqa: B018


def test_generate_and_stream_agree(llm: EdgeLLM) -> None:
    whole = llm.generate("hello", GREEDY)
    assert isinstance(whole, Completion)
    assert whole.finish_reason == "length"
    assert len(whole.token_ids) == whole.usage.completion_tokens == 8
    assert whole.tier == "local"
    chunks = list(llm.stream("hello", GREEDY))
    assert all(isinstance(chunk, Chunk) for chunk in chunks)
    assert "".join(chunk.text for chunk in chunks) == whole.text == llm.tokenizer.decode(whole.token_ids)
    assert chunks[-1].finish_reason == "length"
    usage = chunks[-1].usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, 8)


def test_a_string_is_one_user_message(llm: EdgeLLM) -> None:
    prompt = "<|user|>\nhello<|assistant|>\n"
    ids = llm.tokenizer.encode(prompt, parse_special=True)
    by_ids = llm.generate(ids, GREEDY)
    assert by_ids.usage.prompt_tokens == len(ids)
    for same in ("hello", [{"role": "user", "content": "hello"}], np.array(ids)):
        assert llm.generate(same, GREEDY).token_ids == by_ids.token_ids  # type: ignore[arg-type]


def test_ids_are_raw(llm: EdgeLLM) -> None:
    ids = llm.tokenizer.encode("hello")
    answer = llm.generate(ids, GREEDY)
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.token_ids[0] == int(np.argmax(llm.logits(ids)))


def test_score_and_logits(llm: EdgeLLM) -> None:
    ids = llm.tokenizer.encode("some words to score")
    scores = llm.score(ids)
    assert scores.shape == (len(ids) - 1,)
    logits = llm.logits(ids[:5]).astype(np.float64)
    expected = logits[ids[5]] - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
    assert scores[4] == pytest.approx(expected, abs=1e-3)


def test_what_the_server_uses(llm: EdgeLLM) -> None:
    assert llm.model_id == "synthetic:tiny"
    assert llm.ready
    assert llm.created > 1_600_000_000
    assert llm.token_bytes(llm.tokenizer.encode("h")[0]) == b"h"
    with llm.start_chat([{"role": "user", "content": "hello"}], GREEDY) as generation:
        chat = [token for chunk in generation for token in chunk.token_ids]
    assert tuple(chat) == llm.generate("hello", GREEDY).token_ids
    with llm.start_completion("hello", GREEDY) as generation:
        plain = [token for chunk in generation for token in chunk.token_ids]
    assert tuple(plain) == llm.generate(llm.tokenizer.encode("hello"), GREEDY).token_ids


def test_an_answer_has_the_form_that_is_asked_for(llm: EdgeLLM) -> None:
    grammar = Grammar.json_schema({"type": "array", "items": {"enum": ["é", 1, True]}, "minItems": 2, "maxItems": 4})
    for seed in range(3):
        answer = llm.generate("hello", SamplingParams(temperature=1, seed=seed, max_tokens=200, grammar=grammar))
        assert answer.finish_reason == "stop"
        assert 2 <= len(json.loads(answer.text)) <= 4


def test_generation_defaults_of_the_model(llm: EdgeLLM) -> None:
    assert set(llm.eos_ids) == set(SyntheticCheckpoint("tiny").text.generation["eos_token_id"])


@pytest.mark.parametrize("prompt", [[], [1.5], [True], [{"role": "user"}, 1], ["a"], [{"role": "user"}]])
def test_prompts_that_are_none(llm: EdgeLLM, prompt: list[object]) -> None:
    with pytest.raises(InvalidRequest):
        llm.generate(prompt, GREEDY)  # type: ignore[arg-type]


def test_several_completions_are_for_streams(llm: EdgeLLM) -> None:
    with pytest.raises(InvalidRequest, match="use stream"):
        llm.generate("hello", SamplingParams(n=2, max_tokens=2))
    assert {chunk.index for chunk in llm.stream("hello", SamplingParams(n=2, max_tokens=2))} == {0, 1}


def test_prompt_too_long_names_both_counts(llm: EdgeLLM) -> None:
    with pytest.raises(PromptTooLong, match=r"1500 tokens.* 1024") as failure:
        llm.generate([1] * 1500)
    assert failure.value.param == "prompt"
    with pytest.raises(PromptTooLong, match=r"1000 tokens and max_tokens asks for 100 more.* 1024") as failure:
        llm.stream([1] * 1000, SamplingParams(max_tokens=100))
    assert failure.value.param == "max_tokens"


def test_closing_a_stream_cancels(llm: EdgeLLM) -> None:
    chunks = llm.stream("hello", SamplingParams(temperature=0, ignore_eos=True))
    next(chunks)
    chunks.close()
    assert list(chunks) == []


def test_many_threads_get_their_own_answers(llm: EdgeLLM) -> None:
    prompts = [f"question {index}" for index in range(6)]
    alone = {prompt: llm.generate(prompt, GREEDY).text for prompt in prompts}
    together: dict[str, str] = {}

    def ask(prompt: str) -> None:
        together[prompt] = llm.generate(prompt, GREEDY).text

    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_closed(home: Path) -> None:
    llm = EdgeLLM("synthetic:tiny", "onnxruntime:cpu", weights="fp32")
    llm.close()
    llm.close()
    assert not llm.ready
    with pytest.raises(EngineStopped):
        llm.generate("hello", GREEDY)


# --- loading ----------------------------------------------------------------------------------------------------------


def test_it_says_where_it_runs_and_why(llm: EdgeLLM) -> None:
    assert llm.reason == "it was asked for"
    assert llm.placement["device"] == llm.device
    assert llm.placement["variant"].endswith("-fp32")


def test_bad_arguments_come_before_any_work(home: Path) -> None:
    with pytest.raises(UnknownDevice):
        EdgeLLM("synthetic:glm-edge-4b", "tpu")
    with pytest.raises(ConfigError, match="is not a size"):
        EdgeLLM("synthetic:glm-edge-4b", memory_budget="much")
    with pytest.raises(UnknownReference):
        EdgeLLM("llama")
    with pytest.raises(DeviceUnavailable):
        EdgeLLM("synthetic:glm-edge-4b", "npu")
    assert not any("glm-edge-4b" in path.name for path in home.rglob("*"))


def test_auto_takes_the_engine_that_a_package_has(home: Path, tmp_path: Path) -> None:
    export(SyntheticCheckpoint("tiny"), tmp_path / "made", ("onnx",), "int8")
    with EdgeLLM(str(tmp_path / "made")) as llm:
        assert llm.device == "onnxruntime:cpu"
        assert llm.variant.weights == "int8"
    with pytest.raises(DeviceUnavailable, match="no openvino variant"):
        EdgeLLM(str(tmp_path / "made"), "openvino:cpu")


def test_wrong_hash_is_refused(home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    export(SyntheticCheckpoint("tiny"), folder, ("onnx",), "int4")
    EdgeLLM(str(folder)).close()
    weights = folder / "onnx-int4" / "model.onnx.data"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CorruptModel, match=r"model\.onnx\.data has SHA-256"):
        EdgeLLM(str(folder))


def test_prompt_lookup_answers_the_same(home: Path) -> None:
    prompt = [5, 6, 7, 8, 9, 10] * 8
    with EdgeLLM("synthetic:tiny", "onnxruntime:cpu", weights="fp32") as llm:
        plain = llm.generate(prompt, GREEDY)
    with EdgeLLM("synthetic:tiny", "onnxruntime:cpu", weights="fp32", prompt_lookup=True) as llm:
        assert llm.generate(prompt, GREEDY).token_ids == plain.token_ids


def test_memory_budget(home: Path) -> None:
    with pytest.raises(
        BudgetError, match=r"no variant of synthetic:tiny fits: onnxruntime:cpu: onnx-fp32 needs .* MiB"
    ):
        EdgeLLM("synthetic:tiny", "onnxruntime:cpu", "8MiB", weights="fp32")
    for plenty in ("2GiB", "90%"):
        with EdgeLLM("synthetic:tiny", "onnxruntime:cpu", plenty, weights="fp32") as llm:
            assert llm.max_context == 1024
    with EdgeLLM("synthetic:tiny", "onnxruntime:cpu", _tight(home), weights="fp32", max_sequences=1) as llm:
        assert 256 <= llm.max_context < 1024
        with pytest.raises(PromptTooLong, match=str(llm.max_context)):
            llm.generate([1] * 1023, GREEDY)


def test_a_type_of_cache_that_the_device_has_not(home: Path) -> None:
    with pytest.raises(DeviceUnavailable, match="onnxruntime:cpu keeps keys and values as float32, not int8"):
        EdgeLLM("synthetic:tiny", "onnxruntime:cpu", weights="fp32", kv_type="int8")


def _tiny(home: Path) -> tuple[Package, Variant]:
    (folder,) = (home / "models").glob("synthetic-tiny-*")
    package = Package.open(folder)
    variant = package.variant("onnxruntime", "fp32")
    assert variant is not None
    return package, variant


def _tight(home: Path) -> int:
    """What this process would have with about 700 tokens of KV cache."""
    model = Model.of(*_tiny(home))
    resident = psutil.Process().memory_info().rss
    return footprint(model, Use(700, 1), resident).budget


class WithoutTemplate(SyntheticCheckpoint):
    """A base model that wants a bos token."""

    @property
    def text(self) -> TextFiles:  # type: ignore[override]
        text = super().text
        return TextFiles(text.tokenizer_json, None, {"bos_token": "<|system|>"}, True, text.generation)


def test_a_base_model_goes_on_from_text(home: Path, tmp_path: Path) -> None:
    export(WithoutTemplate("tiny"), tmp_path / "base", ("onnx",), "int4")
    with EdgeLLM(str(tmp_path / "base")) as llm:
        bos = llm.tokenizer.token_to_id("<|system|>")
        assert bos is not None
        ids = [bos, *llm.tokenizer.encode("hello")]
        answer = llm.generate("hello", GREEDY)
        assert answer.usage.prompt_tokens == len(ids)
        assert answer.token_ids == llm.generate(ids, GREEDY).token_ids
        with pytest.raises(TemplateError, match="no chat template"):
            llm.generate([{"role": "user", "content": "hello"}])
