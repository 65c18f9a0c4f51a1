"""Stages: found, called in order, put aside when they raise, replaced between requests."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.detokenizer import TokenText
from edge_runtime.errors import PolicyError, PromptTooLong
from edge_runtime.facts import Facts
from edge_runtime.prompts import About, Messages, TierRequest
from edge_runtime.sampling import SamplingParams
from edge_runtime.stages import registry
from edge_runtime.stages.context_ranking import ContextRanking
from edge_runtime.stages.plain_checks import broken_json, refusal, repetition, wrong_language
from edge_runtime.stages.prompt_signals import PromptSignals
from edge_runtime.stages.registry import DEFAULT, Stages, installed
from tests.tiers.house import LOCAL, cloud, house, task
from tests.tiers.test_policy import needs_cld2
from tests.tiers.upstream import answers, upstream

SAMPLES = Path(__file__).parents[2] / "samples"


def facts(question: str = "what is it?", about: About | None = None, **params: Any) -> Facts:
    request = TierRequest(Messages([{"role": "user", "content": question}]), SamplingParams(**params), about or About())
    return Facts(request, 7)


class Upper:
    """Shouts, a letter late."""

    def output(self, facts: Facts) -> Upper:
        self.held = ""
        return Upper()

    def __init__(self) -> None:
        self.held = ""

    def add(self, text: str) -> str:
        text, self.held = self.held + text, text[-1:]
        return text[: len(text) - len(self.held)].upper()

    def flush(self) -> str:
        return self.held.upper()


class Broken:
    def signals(self, facts: Facts) -> dict[str, float]:
        raise RuntimeError("signals are down")

    def problem(self, *given: Any) -> str | None:
        raise RuntimeError("checks are down")


class Mute:
    def output(self, facts: Facts) -> Mute:
        return self

    def add(self, text: str) -> str:
        raise RuntimeError("output is down")

    def flush(self) -> str:
        return ""


class Unmakable:
    def __init__(self) -> None:
        raise RuntimeError("no such device")

    def signals(self, facts: Facts) -> dict[str, float]:
        return {}


class Nothing:
    pass


class Spelled:
    """Every token by its number."""

    broken = False

    def decoding(self, decode: Callable[[Sequence[int]], str]) -> TokenText:
        return Spelled()

    def add(self, token: int, /) -> str:
        if self.broken:
            raise RuntimeError("decoding is down")
        return f"<{token}>"

    def flush(self) -> str:
        return ""


@pytest.fixture
def here_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stages of this module are installed."""
    found = installed() | {
        name.lower(): EntryPoint(name.lower(), f"{__name__}:{name}", registry.GROUP)
        for name in ("Upper", "Broken", "Mute", "Unmakable", "Nothing", "Spelled")
    }
    monkeypatch.setattr(registry, "installed", lambda: found)


def test_three_are_built_in_and_found_by_entry_points() -> None:
    assert {"prompt-signals", "plain-checks", "context-ranking"} <= set(installed())
    assert Stages().names == DEFAULT


def test_unknown_ones_and_those_that_are_none_are_refused(here_too: None) -> None:
    with pytest.raises(PolicyError, match="there is no stage nonsense; installed: broken, context-ranking"):
        Stages(["nonsense"])
    with pytest.raises(PolicyError, match="is no stage: it has none of the methods signals, problem"):
        Stages(["nothing"])


def test_one_that_raises_is_put_aside_with_its_reason(here_too: None) -> None:
    stages = Stages(["broken", "prompt-signals", "unmakable"])
    assert stages.aside == {"unmakable": "RuntimeError: no such device"}
    assert stages.signals(facts())["tokens"] > 0
    assert stages.aside["broken"] == "RuntimeError: signals are down"
    assert stages.names == ("prompt-signals",)
    assert stages.problem("x", [], True, facts()) is None


def test_an_answer_survives_a_stage_that_breaks_in_it(here_too: None, tmp_path: Path) -> None:
    with house(tmp_path, 'stages = ["mute", "upper"]\n' + LOCAL) as here:
        assert here.ask().text == here.local.text().upper()
        assert "output is down" in here.dispatcher.health()["stages aside"]["mute"]
        assert here.ask().text == here.local.text().upper()


def test_output_stages_see_every_tier_s_text(here_too: None, tmp_path: Path) -> None:
    with (
        upstream(answers("from ", "far ", "away")) as server,
        house(tmp_path, 'stages = ["upper"]\n' + cloud(server.url) + LOCAL + task(prefer="remote")) as here,
    ):
        answer = here.ask()
        assert answer.text == "FROM FAR AWAY"
        assert answer.chunks[-1].finish_reason == "stop"


def test_enabling_and_replacing_happen_between_requests(here_too: None, tmp_path: Path) -> None:
    with house(tmp_path, LOCAL) as here:
        plain = here.local.text()
        with here.start() as running:
            begun = next(running).text
            here.write('stages = ["upper"]\n' + LOCAL)
            assert here.ask().text == plain.upper()
            assert begun + "".join(chunk.text for chunk in running) == plain
        here.write('stages = ["spelled"]\n' + LOCAL)
        assert here.ask().text.startswith("<")
        here.write(LOCAL)
        assert here.ask().text == plain


def test_a_decoding_stage_that_breaks_leaves_the_rest_to_the_tokenizer(
    here_too: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with house(tmp_path, 'stages = ["spelled"]\n' + LOCAL) as here:
        monkeypatch.setattr(Spelled, "broken", True)
        assert here.ask().text == here.local.text()
        assert "decoding is down" in here.dispatcher.health()["stages aside"]["spelled"]
        assert here.ask().text == here.local.text()


def test_the_sample_is_a_screenful_and_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (SAMPLES / "stage" / "edge_glm_units.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 50
    monkeypatch.syspath_prepend(str(SAMPLES / "stage"))
    found = installed() | {"units": EntryPoint("units", "edge_glm_units:Units", registry.GROUP)}
    monkeypatch.setattr(registry, "installed", lambda: found)
    stages = Stages(["units"])
    assert stages.signals(facts("Convert 5 inches")) == {"units": 1.0}
    assert "absolute zero" in (stages.problem("it is -500 °F", [], True, facts()) or "")
    made = stages.output(facts())
    assert made is not None
    pieces = "Water boils at 21", "2 °", "F, freezes at 32 °F and 7"
    assert "".join(map(made.add, pieces)) + made.flush() == "Water boils at 100 °C, freezes at 0 °C and 7"


def test_a_changed_file_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    source = tmp_path / "my_own_stage.py"
    text = "class Mine:\n    def signals(self, facts):\n        return {'mine': 1}\n"
    source.write_text(text)
    found = {"mine": EntryPoint("mine", "my_own_stage:Mine", registry.GROUP)}
    assert Stages(["mine"], found).signals(facts()) == {"mine": 1.0}
    assert Stages(["mine"], found).signals(facts()) == {"mine": 1.0}
    source.write_text(text.replace("1}", "22}"))
    os.utime(source, (1, 2_000_000_000))
    assert Stages(["mine"], found).signals(facts()) == {"mine": 22.0}


# --- the built-in ones ------------------------------------------------------------------------------------------------


def test_what_is_left_out_of_a_long_conversation_has_least_to_do_with_the_question(tmp_path: Path) -> None:
    talk = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "the pump in hall three is blue and loud"},
        {"role": "assistant", "content": "noted"},
        {"role": "user", "content": "lunch is at noon and there is soup with bread for everybody here"},
        {"role": "assistant", "content": "thank you, that sounds good"},
        {"role": "user", "content": "which colour has the pump?"},
    ]

    def count(messages: Any) -> int:
        return sum(len(each["content"].split()) for each in messages)

    kept = ContextRanking().shorten(talk, count, 20)
    assert count(kept) <= 20
    assert kept[0]["role"] == "system"
    assert kept[-1] == talk[-1]
    assert talk[1] in kept
    assert talk[3] not in kept
    with house(tmp_path, 'stages = ["context-ranking"]\n' + LOCAL, max_prompt=200) as here:
        answer = here.ask(talk)
        assert answer.tiers == ["local"]
        assert "left out" in answer.route.reasons["context"]
        here.write(LOCAL)  # and nothing is left out unless the policy says so
        with pytest.raises(PromptTooLong):
            here.ask(talk)


@pytest.mark.parametrize(
    ("tokens", "found"),
    [([1, 2, 3, 4, 5, 6, 7, 8], False), ([9, 1, 1, 1, 1], True), ([0, *[4, 5, 6] * 4], True), ([4, 5, 6] * 3, False)],
)
def test_repetition(tokens: list[int], found: bool) -> None:
    assert (repetition(tokens) is not None) == found


def test_plain_checks() -> None:
    assert refusal("I'm sorry, but I cannot help with that")
    assert refusal("As an AI language model, I")
    assert not refusal("The sky is blue. I cannot say why")
    assert broken_json("Sure! Here", False) == "it is no JSON"
    assert broken_json('{"a": [1, 2', False) is None
    assert "broken" in (broken_json('{"a": [1, 2', True) or "")
    assert broken_json('```json\n{"a": 1}\n```', True) is None


@needs_cld2
def test_wrong_language() -> None:
    german = "Der Himmel ist blau, weil das Licht der Sonne in der Luft gestreut wird."
    assert "it is in de" in (wrong_language(german, "Why is the sky blue today?", "en") or "")
    assert wrong_language(german, "Translate into German: the sky is blue because", "en") is None
    assert wrong_language(german, "Warum ist der Himmel blau?", "de") is None


def test_signals_tell_questions_apart() -> None:
    signals = PromptSignals().signals
    assert signals(facts("What is 17 + 25?"))["operators"] > 0
    assert signals(facts("Sort these words"))["order"] == 1
    assert signals(facts("def f(x): return x"))["code"] == 1
    assert signals(facts("The pump is blue. What colour has the pump?"))["looks up"] == pytest.approx(1 / 3)
    assert signals(facts("x", max_tokens=99))["answer"] > 4
    assert set(signals(facts(""))) == set(signals(facts("x" * 100_000)))


@needs_cld2
def test_a_foreign_question_is_a_signal() -> None:
    assert PromptSignals().signals(facts("Was ist eine Wärmepumpe und wie funktioniert sie?"))["foreign"] == 1


def test_signals_are_bounded_in_time() -> None:
    for text in ("a" * 1_000_000, "1+" * 500_000, "\n" * 500_000, "if then " * 100_000):
        PromptSignals().signals(facts(text))  # the suite's timeout holds it
