"""A device for one sequence with static shapes, through the engine: requests queue, prefixes stay, limits are told."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edge_runtime import EdgeLLM, SamplingParams
from edge_runtime.errors import ConfigError, PromptTooLong
from edge_runtime.exporting import export_package

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EdgeLLM]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGE_GLM_HOME", str(tmp_path_factory.mktemp("home")))
        with EdgeLLM("synthetic:tiny", "openvino:npu-emulated", weights="fp16", threads=2) as model:
            yield model


def ids(seed: int, length: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, 256, length)]


def test_where_it_runs(llm: EdgeLLM) -> None:
    assert llm.placement == {
        "device": "openvino:npu-emulated",
        "variant": "openvino-npu-fp16",
        "reason": "it was asked for",
    }
    assert llm.max_context == 1024


def test_a_prompt_longer_than_compiled_for(llm: EdgeLLM) -> None:
    with pytest.raises(PromptTooLong, match=r"the prompt has 1024 tokens.* 1023"):
        llm.generate(ids(0, 1024), SamplingParams(max_tokens=1))


def test_compiled_for_as_long_prompts_as_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGE_GLM_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="max_prompt must be at least 1, not 0"):
        EdgeLLM("synthetic:tiny", "openvino:npu-emulated", max_prompt=0)
    with EdgeLLM("synthetic:tiny", "openvino:npu-emulated", weights="fp16", threads=1, max_prompt=64) as model:
        assert len(model.generate(ids(0, 64), GREEDY).token_ids) == 8
        with pytest.raises(PromptTooLong, match=r"the prompt has 65 tokens.* 64"):
            model.generate(ids(0, 65), GREEDY)


def test_scores_are_those_of_the_cpu(llm: EdgeLLM) -> None:
    prompt = ids(1, 60)
    with EdgeLLM("synthetic:tiny", "openvino:cpu", weights="fp32", threads=2) as exact:
        np.testing.assert_allclose(llm.score(prompt), exact.score(prompt), atol=0.05)
        assert llm.logits(prompt).argmax() == exact.logits(prompt).argmax()


def test_the_next_turn_keeps_the_prefix(llm: EdgeLLM) -> None:
    first = ids(2, 100)
    answer = llm.generate(first, GREEDY)
    second = [*first, *answer.token_ids, *ids(3, 30)]
    known = llm.generate(second, GREEDY)
    assert known.usage.cached_tokens >= 100
    llm.generate(ids(4, 50), GREEDY)  # takes the only place
    anew = llm.generate(second, GREEDY)
    assert anew.usage.cached_tokens == 0
    assert anew.token_ids == known.token_ids


def test_requests_queue(llm: EdgeLLM) -> None:
    prompts = [ids(seed, 40) for seed in range(5)]
    expected = [llm.generate(prompt, GREEDY).token_ids for prompt in prompts]
    answers: dict[int, tuple[int, ...]] = {}

    def ask(place: int) -> None:
        answers[place] = llm.generate(prompts[place], GREEDY).token_ids

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[place] for place in range(5)] == expected


def test_several_answers_to_one_prompt(llm: EdgeLLM) -> None:
    """There is no place for a fork: the second is computed after the first."""
    params = SamplingParams(temperature=0, max_tokens=8, n=2, ignore_eos=True)
    texts = {0: "", 1: ""}
    for chunk in llm.stream(ids(5, 30), params):
        texts[chunk.index] += chunk.text
    assert texts[0] == texts[1] != ""


def test_a_cancelled_one_lets_the_next_in(llm: EdgeLLM) -> None:
    expected = llm.generate(ids(6, 40), GREEDY).token_ids
    stream = llm.stream(ids(7, 40), SamplingParams(temperature=0, max_tokens=500, ignore_eos=True))
    next(iter(stream))
    stream.close()
    assert llm.generate(ids(6, 40), GREEDY).token_ids == expected


def test_the_cpu_answers_meanwhile_and_what_is_too_long(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("EDGE_GLM_HOME", str(home))
    folder = str(home / "both")
    export_package("synthetic:tiny", Path(folder), ["openvino-npu", "onnxruntime"], "fp16")
    with EdgeLLM(folder, "openvino:npu-emulated", threads=1, fallback=True, prefix_store_bytes=0) as model:
        at_first = model.placement
        assert len(model.generate(ids(1, 20), GREEDY).token_ids) == 8
        if at_first["device"] == "onnxruntime:cpu":  # unless the compiler was faster
            assert "not openvino:npu-emulated: it is compiling the model" in at_first["reason"]
        deadline = time.monotonic() + 120
        while model.device != "openvino:npu-emulated":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert len(model.generate(ids(1, 20), GREEDY).token_ids) == 8
        assert model.max_context == 1024
        score = model.score(ids(2, 1024))  # the NPU takes one token less
        assert score.shape == (1023,)
