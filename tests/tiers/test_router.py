"""The rules by which tiers are ordered, and what an endpoint's stream may hold."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from edge_runtime.errors import InvalidRequest, PromptTooLong, TierUnavailable
from edge_runtime.policy.rules import LocalTierSpec, RemoteTierSpec, TaskClass
from edge_runtime.prompts import Fit
from edge_runtime.routing.router import Candidate, Estimate, Router
from edge_runtime.sampling import SamplingParams
from edge_runtime.tiers.openai_events import Broken, EventParser, Nonsense
from edge_runtime.timing.model import ALONE, Beside, TimingModel
from edge_runtime.timing.ttft import PredictedTTFT, predict_ttft
from tests.timing.known import CHUNK, observed

PARAMS = SamplingParams(max_tokens=10)
ROOM = Fit(50, 100, 100)
ANY = TaskClass(name="any", privacy="any")


def local(name: str = "local", fit: Fit = ROOM, **more: Any) -> Candidate:
    return Candidate(LocalTierSpec(name=name), fit, **more)


def remote(name: str = "cloud", fit: Fit = ROOM, **more: Any) -> Candidate:
    return Candidate(RemoteTierSpec(name=name, base_url="http://x", model="m", context=100), fit, **more)


def test_length_is_a_gate_with_both_counts() -> None:
    plan = Router.choose(
        PARAMS,
        ANY,
        [
            local("small", Fit(50, 40, 64)),
            local("snug", Fit(50, 60, 60)),
            local("tight", Fit(50, 59, 59)),
            local("large"),
        ],
    )
    assert plan.order == ("snug", "large")
    assert "50 tokens" in plan.reasons["small"]
    assert "take 40" in plan.reasons["small"]
    assert "10 more" in plan.reasons["tight"]
    assert "fits" in plan.reasons["large"]
    assert Router.choose(PARAMS, ANY, []).order == ()


def test_privacy_is_the_first_gate() -> None:
    plan = Router.choose(PARAMS, TaskClass(name="mine"), [remote(refusal="offline", unsupported="no tools"), local()])
    assert plan.order == ("local",)
    assert plan.reasons["cloud"] == "privacy of class mine is local-only"
    assert not plan.missing
    assert not plan.judge


def test_what_cannot_be_asked_now_is_missing_only_if_it_was_preferred() -> None:
    before = Router.choose(PARAMS, ANY, [remote(refusal="offline"), local()])
    assert before.order == ("local",)
    assert before.missing == {"cloud": "offline"}
    after = Router.choose(PARAMS, ANY, [local(), remote(refusal="offline")])
    assert not after.missing
    never = Router.choose(PARAMS, ANY, [remote(refusal="offline", unsupported="no tools"), local()])
    assert not never.missing


def test_where_no_remote_tier_can_be_asked_it_says_what_was_not_done() -> None:
    """A local answer that would have been judged, or not even begun."""
    off = [local(), remote(refusal="offline")]
    unjudged = Router.choose(PARAMS, ANY, off, Estimate(0.5, 0.1))
    assert "not judged" in unjudged.reasons["local"]
    assert not unjudged.missing
    assert not unjudged.judge
    hard = Router.choose(PARAMS, ANY, off, Estimate(0.05, 0.1))
    assert hard.order == ("local",)
    assert hard.missing == {"cloud": "offline"}
    for candidates in ([local()], [local(), remote()], [local(), remote(refusal="offline", unsupported="no tools")]):
        assert "not judged" not in Router.choose(PARAMS, ANY, candidates).reasons["local"]
    private = Router.choose(PARAMS, TaskClass(name="mine"), off, Estimate(0.05, 0.1))
    assert "not judged" not in private.reasons["local"]
    assert not private.missing


def test_what_is_too_hard_goes_elsewhere_first() -> None:
    both = [local(), remote()]
    assert Router.choose(PARAMS, ANY, both, Estimate(0.05, 0.1)).order == ("cloud", "local")
    assert Router.choose(PARAMS, ANY, both, Estimate(0.05, 0.1)).judge is False
    easy = Router.choose(PARAMS, ANY, both, Estimate(0.5, 0.1))
    assert easy.order == ("local", "cloud")
    assert easy.judge
    for task in (
        TaskClass(name="a", privacy="any", escalate=False),
        TaskClass(name="a", privacy="any", prefer="order"),
        TaskClass(name="a"),
    ):
        assert Router.choose(PARAMS, task, both, Estimate(0.05, 0.1)).order[0] == "local"
    several = SamplingParams(n=2)
    assert Router.choose(several, ANY, both, Estimate(0.05, 0.1)).order[0] == "local"
    assert not Router.choose(several, ANY, both, Estimate(0.5, 0.1)).judge


def test_slow_tiers_come_last_but_stay() -> None:
    task = TaskClass(
        name="quick", privacy="any", latency=msgspec.convert({"ttft": 50, "total": 100}, type=type(ANY.latency))
    )
    plan = Router.choose(PARAMS, task, [local(ttft_ms=80), remote(ttft_ms=20, total_ms=90)])
    assert plan.order == ("cloud", "local")
    assert "took 80 ms lately, the class wants 50" in plan.reasons["local"]
    plan = Router.choose(PARAMS, task, [local(ttft_ms=20, total_ms=300), remote()])
    assert plan.order == ("cloud", "local")
    assert Router.choose(PARAMS, ANY, [local(ttft_ms=9999), remote()]).order[0] == "local"


def predicted_ttft(prompt: int, beside: Beside = ALONE) -> PredictedTTFT:
    return predict_ttft(TimingModel(observed(), CHUNK), prompt, 0, beside)


@pytest.mark.parametrize(
    ("latency", "prompt", "beside", "lately", "order", "reason"),
    [
        ({"ttft": 500}, 300, ALONE, None, ("local", "cloud"), "first choice of class quick"),
        ({"ttft": 500}, 2000, ALONE, None, ("cloud", "local"), "its first token will take about 1.2"),
        ({"ttft": 500}, 300, Beside(prompts=(1800,)), None, ("cloud", "local"), "after 1800 tokens of others"),
        ({"ttft": 150}, 300, Beside(12, 6000), None, ("cloud", "local"), "beside 12 answers, the class wants 150 ms"),
        # what is predicted for this prompt counts more than what others took
        ({"ttft": 500}, 300, ALONE, 9000, ("local", "cloud"), "first choice of class quick"),
        ({"ttft": 500}, 2000, ALONE, 20, ("cloud", "local"), "its first token will take about 1.2"),
        ({"total": 500}, 2000, ALONE, None, ("cloud", "local"), "its first token alone will take about 1.2"),
        ({"total": 500}, 300, ALONE, None, ("local", "cloud"), "first choice of class quick"),
        ({}, 2000, ALONE, None, ("local", "cloud"), "first choice of class quick"),
    ],
)
def test_what_is_predicted_decides(
    latency: dict[str, float], prompt: int, beside: Beside, lately: float | None, order: tuple[str, str], reason: str
) -> None:
    task = TaskClass(name="quick", privacy="any", latency=msgspec.convert(latency, type=type(ANY.latency)))
    plan = Router.choose(PARAMS, task, [local(predicted_ttft=predicted_ttft(prompt, beside), ttft_ms=lately), remote()])
    assert plan.order == order
    assert reason in plan.reasons["local"]


def test_where_every_tier_is_slow_the_first_choice_stays() -> None:
    task = TaskClass(name="quick", privacy="any", latency=msgspec.convert({"ttft": 50}, type=type(ANY.latency)))
    plan = Router.choose(PARAMS, task, [local(predicted_ttft=predicted_ttft(2000)), remote(ttft_ms=80)])
    assert plan.order == ("local", "cloud")
    assert "the class wants 50" in plan.reasons["local"]
    assert "took 80 ms lately" in plan.reasons["cloud"]


def test_refusals_say_what_is_wrong() -> None:
    def refusal(*candidates: Candidate, task: TaskClass = ANY) -> Exception:
        plan = Router.choose(PARAMS, task, candidates)
        assert plan.order == ()
        return Router.refusal(PARAMS, task, candidates, plan)

    long = Fit(500, 100, 100)
    error = refusal(local(fit=long), remote(fit=Fit(500, 200, 200)))
    assert isinstance(error, PromptTooLong)
    assert "take 200" in str(error)
    assert isinstance(refusal(local(fit=long), remote(), task=TaskClass(name="mine")), PromptTooLong)
    assert isinstance(refusal(local(fit=long), remote(unsupported="no")), PromptTooLong)
    assert isinstance(refusal(local(unsupported="no tools")), InvalidRequest)
    error = refusal(local(fit=long), remote(refusal="offline"))
    assert isinstance(error, TierUnavailable)
    assert "offline" in str(error)


# --- events -----------------------------------------------------------------------------------------------------------


def choice(**more: Any) -> str:
    return msgspec.json.encode({"choices": [{"index": 0, **more}]}).decode()


@pytest.mark.parametrize(
    "data",
    [
        "nope",
        "[]",
        "3",
        "{}",
        '{"choices": 3}',
        '{"choices": [3]}',
        choice(delta=3),
        choice(delta={"content": 5}),
        choice(delta={"content": "x"}, finish_reason="because"),
        '{"choices": [{"index": 7, "delta": {"content": "x"}}]}',
        '{"choices": [{"index": "0", "delta": {"content": "x"}}]}',
        '{"choices": [{"index": -1, "delta": {}}]}',
        "\ud800",
    ],
)
def test_nonsense_is_named(data: str) -> None:
    with pytest.raises(Nonsense):
        list(EventParser("cloud", 1).add(data))


def test_a_stream_is_whole_when_every_completion_has_ended() -> None:
    parser = EventParser("cloud", 2)
    one, two = choice(delta={"content": "a"}), '{"choices": [{"index": 1, "delta": {}, "finish_reason": "length"}]}'
    assert [chunk.text for chunk in parser.add(one)] == ["a"]
    assert [chunk.finish_reason for chunk in parser.add(two)] == ["length"]
    assert not parser.complete
    list(parser.add(choice(delta={}, finish_reason="stop")))
    assert parser.complete
    assert not parser.done
    list(parser.add(" [DONE] "))
    assert parser.done
    with pytest.raises(Nonsense, match="is over"):
        list(parser.add(one))


@pytest.mark.parametrize(
    ("usage", "known"),
    [
        ({"prompt_tokens": 3, "completion_tokens": 4}, (3, 4, 0)),
        ({"prompt_tokens": 3, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 2}}, (3, 4, 2)),
        ({"prompt_tokens": -3, "completion_tokens": 4}, None),
        ({"prompt_tokens": "3", "completion_tokens": 4}, None),
        ({"prompt_tokens": True, "completion_tokens": 2**60}, None),
        ("many", None),
        (None, None),
    ],
)
def test_usage_counts_only_if_it_makes_sense(usage: Any, known: tuple[int, int, int] | None) -> None:
    parser = EventParser("cloud", 1)
    list(parser.add(msgspec.json.encode({"choices": [], "usage": usage}).decode()))
    found = parser.usage
    assert (None if found is None else (found.prompt_tokens, found.completion_tokens, found.cached_tokens)) == known


@pytest.mark.parametrize("error", [{"message": "out of memory"}, "out of memory", {"detail": "out of memory"}])
def test_an_error_in_the_stream_is_told(error: Any) -> None:
    with pytest.raises(Broken, match="out of memory"):
        list(EventParser("cloud", 1).add(msgspec.json.encode({"error": error}).decode()))
