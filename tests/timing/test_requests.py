"""What the timing model is fitted to: which requests are timed, and that what is written down is what was asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from devices.base import DecoderLimits
from edge_runtime.bench import local
from edge_runtime.bench.job import Job
from edge_runtime.bench.requests import LONGEST, NEW_TOKENS, SHORTEST, Timer, observe, shapes
from edge_runtime.chunks import chunks
from edge_runtime.timing.model import TimingModel
from edge_runtime.timing.observations import EachToken, FirstToken

LIMITS = DecoderLimits(8192, 8192, 16, 256, 8192, 1000)


@pytest.mark.parametrize(
    ("changes", "tps", "longest", "batches"),
    [
        ({}, 1e6, LONGEST, 4),
        ({}, 700, 969, 4),
        ({}, 10, SHORTEST, 4),
        ({"max_context": 1024, "max_prompt": 1024, "kv_tokens": 1024}, 1e6, 1024 - 4 * NEW_TOKENS, 3),
        ({"max_prompt": 200}, 1e6, 200, 4),
        ({"max_sequences": 4}, 1e6, LONGEST, 2),
        ({"max_sequences": 1}, 1e6, LONGEST, 0),
    ],
)
def test_requests_are_as_long_as_there_is_time_and_room(
    changes: dict[str, Any], tps: float, longest: int, batches: int
) -> None:
    limits = dataclasses.replace(LIMITS, **changes)
    planned = shapes(limits, tps)
    assert max(planned.alone) == longest
    assert len(set(planned.alone)) == 6
    assert len(planned.batches) == batches
    for count, length, probe in planned.batches:
        assert count <= limits.max_sequences
        assert count * (length + 2 * NEW_TOKENS) + probe <= limits.kv_tokens
    assert all(known < whole <= longest for whole, known in planned.cached)


def test_a_round_takes_the_seconds_that_it_should() -> None:
    for tps in (400, 1000, 2000):
        planned = shapes(LIMITS, tps)
        alone = sum(planned.alone)
        cached = sum(2 * whole - known for whole, known in planned.cached)
        batches = sum(count * length + probe for count, length, probe in planned.batches)
        assert 5 < (alone + cached + batches) / tps < 9


def test_prompts_are_cut_as_the_scheduler_cuts_them() -> None:
    assert list(chunks(0, 600, 256)) == [(0, 256), (256, 256), (512, 88)]
    assert list(chunks(100, 613, 256)) == [(100, 256), (356, 255), (611, 2)]
    assert list(chunks(5, 6, 256)) == [(5, 1)]
    assert list(chunks(7, 7, 256)) == []


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[local.MeasuredLLM]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGE_GLM_HOME", str(tmp_path_factory.mktemp("home")))
        with local.open_model(
            Job(ref="synthetic:tiny", device="onnxruntime:cpu", prompt_tokens=40), prefix_cache=True
        ) as llm:
            yield llm


def test_each_kind_of_request(llm: local.MeasuredLLM) -> None:
    timer = Timer(llm, np.random.default_rng(0))
    first, each = timer.alone(100)
    assert isinstance(first, FirstToken)
    assert isinstance(each, EachToken)
    assert (first.prompt, first.cached, first.beside, each.batch, each.held) == (100, 0, 0, 1, 100 + NEW_TOKENS // 2)
    assert 0 < each.seconds < first.seconds
    first, _ = timer.cached(100, 60)
    assert isinstance(first, FirstToken)
    assert 40 <= first.cached <= 60
    each, first = timer.beside(3, 50, 80)
    assert isinstance(first, FirstToken)
    assert isinstance(each, EachToken)
    assert each.batch == first.beside == 3
    assert first.prompt == 80
    assert 3 * 50 < each.held < first.held
    assert llm.stats.running == 0


def test_a_model_can_be_fitted_to_a_round(llm: local.MeasuredLLM) -> None:
    before = llm.stats.prompt_tokens
    found = observe(llm, 1e6, 0.0)
    assert llm.stats.prompt_tokens > before
    assert all(each.seconds > 0 and each.slowest is None for each in found)
    model = TimingModel(found, llm.limits.prefill_chunk)
    assert 0 < model.ttft(64).seconds < model.ttft(900).seconds
    several = observe(llm, 1e6, 600.0)
    assert all(each.fastest is not None and each.fastest <= each.seconds for each in several)
    assert all(each.slowest is not None and each.slowest >= each.seconds for each in several)
