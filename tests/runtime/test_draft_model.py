"""Answers with a model that drafts are those without, however good it is, and it is left off where it does not pay."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from devices.base import Step
from devices.errors import EngineError
from edge_runtime import EdgeLLM
from edge_runtime.drafting.draft_model import DraftModel
from edge_runtime.drafting.pace import LONGEST, TRIAL_SHARE, DraftPace
from edge_runtime.engine import Engine, EngineStats
from edge_runtime.errors import BudgetError, ConfigError
from edge_runtime.sampling import SamplingParams
from exporters.export import export
from exporters.synthetic import SyntheticCheckpoint
from tests.fake_decoder import FakeDecoder, FakeSequence
from tests.runtime.helpers import Answer, LetterTokenizer, collect, letter

PROMPTS = [[1, 2, 3, 4], [40, 41, 42, 7, 8] * 9, [9] * 30]


class Fixed(DraftPace):
    """Always as many, whatever it takes."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self._count = count

    def length(self, requests: int, most: int) -> int:
        return min(self._count, most)


class Other(FakeDecoder):
    """Agrees with the model in one of ``every`` tokens."""

    def __init__(self, every: int, **more: int) -> None:
        super().__init__(**more)  # type: ignore[arg-type]
        self._every = every

    def _logits(self, sequence: FakeSequence) -> NDArray[np.float32]:
        rows = super()._logits(sequence).copy()
        wrong = np.arange(len(rows)) % self._every != 0
        rows[wrong] = rows[wrong, ::-1]
        return rows


def run(
    decoder: FakeDecoder, draft: DraftModel | None, prompts: Sequence[Sequence[int]], params: SamplingParams
) -> tuple[list[list[Answer]], EngineStats]:
    """Nothing may be left behind in either."""
    with Engine(decoder, LetterTokenizer(), vocab_size=decoder.vocab_size, draft=draft) as engine:
        answers = [collect(each, params.n) for each in [engine.submit(prompt, params) for prompt in prompts]]
        engine.logits([0])
        stats = engine.stats
        decoder.check_integrity()
    for each in answers:
        for answer in each:
            answer.last = None  # it has times and usage
    return answers, stats


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0, max_tokens=60),
        SamplingParams(temperature=1, seed=3, max_tokens=60),
        SamplingParams(temperature=1, seed=4, n=3, max_tokens=40),
        SamplingParams(temperature=0, max_tokens=60, repetition_penalty=1.05),
        SamplingParams(temperature=0, max_tokens=60, stop=(letter(5),)),
        SamplingParams(temperature=0, max_tokens=1),
        SamplingParams(temperature=0, max_tokens=2),
    ],
)
@pytest.mark.parametrize("draft", [FakeDecoder, lambda: Other(2), lambda: Other(64), lambda: Other(3, crop_step=4)])
def test_the_answer_is_that_of_plain_decoding(params: SamplingParams, draft: type[FakeDecoder]) -> None:
    helper = draft()
    plain, _ = run(FakeDecoder(), None, PROMPTS, params)
    drafted, stats = run(FakeDecoder(), DraftModel(helper, Fixed(3)), PROMPTS, params)
    assert drafted == plain
    assert (stats.drafted_tokens > 0) == ((params.max_tokens or 0) > 2)
    assert helper.closed
    assert helper.sequences == []


def test_a_perfect_draft_saves_steps() -> None:
    decoder = FakeDecoder()
    params = SamplingParams(temperature=0, max_tokens=60)
    _, stats = run(decoder, DraftModel(FakeDecoder(), Fixed(4)), PROMPTS[:1], params)
    assert stats.accepted_tokens == stats.drafted_tokens > 40
    assert len(decoder.batches) < 16


def test_requests_are_drafted_for_together() -> None:
    helper = FakeDecoder()
    run(FakeDecoder(), DraftModel(helper, Fixed(2)), [[1], [2], [3]], SamplingParams(temperature=0, max_tokens=20))
    assert any(len(batch) == 3 for batch in helper.batches)


def test_where_it_has_no_place_answers_go_on_without() -> None:
    params = SamplingParams(temperature=0, max_tokens=100)
    plain, _ = run(FakeDecoder(), None, PROMPTS, params)
    for helper in (FakeDecoder(max_sequences=1), FakeDecoder(kv_tokens=32), FakeDecoder(max_context=24)):
        found, _ = run(FakeDecoder(), DraftModel(helper, Fixed(3)), PROMPTS, params)
        assert found == plain


def test_several_that_come_at_once_do_not_take_the_last_place_together() -> None:
    helper = DraftModel(FakeDecoder(max_sequences=2), Fixed(3))
    params = SamplingParams(temperature=1, seed=4, n=4, max_tokens=40)
    plain, _ = run(FakeDecoder(), None, PROMPTS[:1], params)
    found, stats = run(FakeDecoder(), helper, PROMPTS[:1], params)
    assert found == plain
    assert helper.error is None
    assert stats.drafted_tokens > 0


def test_a_draft_that_fails_is_left_alone() -> None:
    def fail(batch: Sequence[Step]) -> None:
        calls.append(len(batch))
        if len(calls) > 5:
            raise EngineError("gone")

    calls: list[int] = []
    helper = DraftModel(FakeDecoder(before_forward=fail), Fixed(3))
    params = SamplingParams(temperature=0, max_tokens=60)
    plain, _ = run(FakeDecoder(), None, PROMPTS[:1], params)
    found, _ = run(FakeDecoder(), helper, PROMPTS[:1], params)
    assert found == plain
    assert len(calls) == 6
    assert "gone" in str(helper.error)


# --- pace -------------------------------------------------------------------------------------------------------------


def paced(
    step: float,
    each: float,
    draft: float,
    acceptance: float,
    steps: int = 400,
    pace: DraftPace | None = None,
    reading: float = 0,
) -> tuple[DraftPace, list[int]]:
    """A machine whose steps take ``step`` and ``each`` more for every token beyond the first, and ``reading`` where a
    draft follows on a step without; lengths it chose."""
    pace, lengths, random = pace or DraftPace(), [], np.random.default_rng(0)
    pace.step_took(1, step)
    for _ in range(steps):
        length = pace.length(1, LONGEST)
        if length and (not lengths or not lengths[-1]):
            pace.caught_up(reading)
        lengths.append(length)
        for _ in range(length):
            pace.draft_took(1, draft)
        pace.step_took(1 + length, step + each * length)
        if length:
            hits = random.random(length) < acceptance
            pace.fared(length, length if hits.all() else int(np.argmin(hits)))
    return pace, lengths


def test_a_cheap_draft_that_holds_is_long() -> None:
    _, lengths = paced(step=10, each=0.2, draft=0.5, acceptance=0.95)
    assert np.mean(lengths[50:]) > 5


def test_a_draft_that_rarely_holds_is_short_or_none() -> None:
    _, lengths = paced(step=10, each=0.2, draft=2, acceptance=0.3)
    assert np.mean(lengths[50:]) < 1.2


@pytest.mark.parametrize(("each", "draft"), [(8.0, 0.5), (0.2, 9.0)])
def test_what_costs_too_much_is_turned_off(each: float, draft: float) -> None:
    """Steps that grow with their tokens, or a draft nearly as slow as the model."""
    _, lengths = paced(step=10, each=each, draft=draft, acceptance=0.7, steps=4000)
    assert sum(length > 0 for length in lengths[:400]) < 12
    lost = [(each + draft) * length / 10 - 2 * (length > 0) for length in lengths[100:]]  # two tokens and more a draft
    assert 0 < sum(lost) <= 2 * TRIAL_SHARE * len(lost)


def test_reading_the_text_again_is_part_of_what_looking_again_loses() -> None:
    """A draft reads all that was said while it was off before it can say what may come next."""
    step, each, draft, reading = 10, 8, 0.5, 400
    _, lengths = paced(step, each, draft, acceptance=0.7, steps=8000, reading=reading)
    later = lengths[100:]
    tried = sum(after > 0 == before for before, after in pairwise(later))
    lost = sum((each + draft) * length / step - 2 * (length > 0) for length in later) + tried * reading / step
    assert tried > 0
    assert lost <= 2 * TRIAL_SHARE * len(later)


def test_what_a_draft_reads_is_told_apart_from_what_it_drafts() -> None:
    class Heard(Fixed):
        def caught_up(self, seconds: float) -> None:
            heard.append("read")

        def draft_took(self, requests: int, seconds: float) -> None:
            heard.append("drafted")

    heard: list[str] = []
    helper = DraftModel(FakeDecoder(prefill_chunk=16), Heard(3))
    run(FakeDecoder(), helper, [[5] * 40], SamplingParams(temperature=0, max_tokens=12))
    assert heard[:5] == ["read"] * 3 + ["drafted"] * 2  # 16, 16 and what is left, which ends in the first of three
    assert heard.count("read") == 3


def test_a_draft_given_up_for_one_text_is_taken_up_with_the_next() -> None:
    """Here six in ten is more than a draft needs, and two in ten less."""
    machine: dict[str, Any] = {"step": 10, "each": 1, "draft": 2.5}
    pace, lengths = paced(acceptance=0.2, **machine)
    assert np.mean(lengths[200:]) < 0.5
    _, lengths = paced(acceptance=0.7, steps=600, pace=pace, **machine)
    assert 0 in lengths
    assert lengths[-200:].count(0) < 20


def test_what_one_request_gains_by_is_not_given_up_for_eight() -> None:
    """Eight requests fill the machine, one does not."""
    pace = DraftPace()
    for tokens in range(1, 73):
        pace.step_took(tokens, 10 + 3 * max(tokens - 8, 0))
    pace.draft_took(1, 0.5)
    pace.draft_took(8, 1.0)
    while pace.length(8, LONGEST):
        pace.fared(3, 2)
    for _ in range(5):
        assert pace.length(1, LONGEST) > 0
        assert pace.length(8, LONGEST) == 0


def test_before_anything_is_known_nothing_is_drafted() -> None:
    assert DraftPace().length(1, 8) == 0


# --- a real engine ----------------------------------------------------------------------------------------------------


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    monkeypatch.setenv("EDGE_GLM_HOME", str(tmp_path / "home"))
    export(SyntheticCheckpoint("tiny"), tmp_path / "model", engines=["onnx", "openvino"], weights="int8")
    export(SyntheticCheckpoint("tiny"), tmp_path / "small", engines=["onnx", "openvino"], weights="int4")
    return tmp_path / "model", tmp_path / "small"


@pytest.mark.parametrize("device", ["onnxruntime:cpu", "openvino:cpu"])
def test_a_model_drafts_for_another(models: tuple[Path, Path], device: str) -> None:
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    with EdgeLLM(str(models[0]), device=device) as llm:
        plain = llm.generate("Hello", params).token_ids
    with EdgeLLM(str(models[0]), device=device, draft=str(models[1])) as llm:
        assert llm.generate("Hello", params).token_ids == plain


def test_models_that_cannot_draft(models: tuple[Path, Path], tmp_path: Path, smollm2_gguf: Path) -> None:
    other = tmp_path / "other"
    export_smollm2(smollm2_gguf, other)
    with pytest.raises(ConfigError, match="vocabularies differ"):
        EdgeLLM(str(models[0]), device="onnxruntime:cpu", draft=str(other))
    with pytest.raises(BudgetError):
        EdgeLLM(str(models[0]), device="onnxruntime:cpu", draft=str(models[1]), memory_budget="100MiB")


def export_smollm2(file: Path, folder: Path) -> None:
    from exporters.formats import open_checkpoint

    export(open_checkpoint(file), folder, engines=["onnx"], weights="int4")
