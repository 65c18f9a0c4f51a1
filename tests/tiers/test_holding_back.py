"""The first words are held back until it stands who answers; then one tier's answer comes, whole."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest

from edge_runtime.errors import EngineError, InvalidRequest, Overloaded, PromptTooLong, TierUnavailable
from edge_runtime.prompts import About, Messages, TierRequest
from edge_runtime.routing.calibration import SCHEMA, Calibration
from edge_runtime.routing.logistic import Logistic
from edge_runtime.sampling import SamplingParams
from edge_runtime.stages.plain_checks import PlainChecks
from edge_runtime.tiers import network
from tests.server.served import wait_until
from tests.tiers.house import GREEDY, LOCAL, QUESTION, cloud, house, task
from tests.tiers.upstream import Connection, answers, delta, stalls, status, stream, upstream

AFAR = ("from ", "far ", "away")
NOWHERE = "http://localhost:9/v1"


def constant(good: float) -> Logistic:
    """Thinks the same of every answer."""
    return Logistic((), (), (), (), math.log(good / (1 - good)))


def calibration(before: float = 0.5, during: float = 0.5, consistent: float = 0.5) -> Calibration:
    return Calibration(
        schema=SCHEMA,
        model="fake",
        before=constant(before),
        during=constant(during),
        consistent=constant(consistent),
        threshold=0.4,
        remote_below=0.1,
    )


def calibrated(folder: Path, **good: float) -> str:
    """The lines of a policy that bring it."""
    (folder / "calibration.json").write_bytes(msgspec.json.encode(calibration(**good)))
    return f'[routing]\ncalibration = "{folder / "calibration.json"}"\n'


def test_a_good_local_answer_stays(tmp_path: Path) -> None:
    with (
        upstream(answers(*AFAR)) as server,
        house(tmp_path, calibrated(tmp_path, during=0.9) + LOCAL + cloud(server.url) + task()) as here,
    ):
        answer = here.ask()
        assert answer.text == here.local.text()
        assert answer.tiers == ["local"]
        assert answer.route.good == pytest.approx(0.9)
        assert "good enough (0.90" in answer.route.reason
        assert answer.route.degraded is None
        assert answer.route.signals["logprob"] != 0
        assert not server.asked


@pytest.mark.parametrize("read", [0, 1, 3])
def test_whoever_leaves_a_good_local_answer_ends_it(read: int, tmp_path: Path) -> None:
    policy = calibrated(tmp_path, during=0.9) + LOCAL + cloud(NOWHERE) + task(hold={"tokens": 2, "ms": 20000})
    with house(tmp_path, policy) as here:
        with here.start(params=SamplingParams(temperature=0, max_tokens=400, stop_token_ids=())) as generation:
            for _ in range(read):
                assert next(generation).tier == "local"
            here.local.gate.clear()
        here.local.gate.set()
        wait_until(lambda: here.local.fake.engine.idle)
        assert here.local.fake.engine.stats.generated_tokens < 400


def test_a_failure_in_a_good_local_answer_is_told(tmp_path: Path) -> None:
    policy = calibrated(tmp_path, during=0.9) + LOCAL + cloud(NOWHERE) + task(hold={"tokens": 2, "ms": 20000})
    with (
        house(tmp_path, policy) as here,
        here.start(params=SamplingParams(temperature=0, max_tokens=400)) as generation,
    ):
        assert next(generation).error is None
        here.local.fake.engine.close()
        last = list(generation)[-1]
        assert last.finish_reason in ("error", "stop", "length")
        assert (last.error is None) == (last.finish_reason != "error")


def test_one_that_is_probably_bad_is_made_elsewhere_whole(tmp_path: Path) -> None:
    with (
        upstream(answers(*AFAR)) as server,
        house(tmp_path, calibrated(tmp_path, during=0.2) + LOCAL + cloud(server.url) + task()) as here,
    ):
        answer = here.ask()
        assert answer.text == "from far away"
        assert answer.tiers == ["cloud"]
        assert "not good enough (0.20 < 0.40)" in answer.route.reason
        assert "good=0.200" in answer.route.headers()["x-edge-glm-route"]
        (generation,) = here.local.started
        rest = list(generation)
        assert rest == [] or rest[-1].finish_reason == "cancelled"  # nobody goes on computing


def test_one_that_is_surely_too_hard_is_not_even_begun(tmp_path: Path) -> None:
    with (
        upstream(answers(*AFAR)) as server,
        house(tmp_path, calibrated(tmp_path, before=0.05) + LOCAL + cloud(server.url) + task()) as here,
    ):
        answer = here.ask()
        assert answer.tiers == ["cloud"]
        assert "probably too hard for the local model (0.05 < 0.10)" in answer.route.reasons["cloud"]
        assert not here.local.started


def test_if_the_better_tier_fails_the_local_answer_is_given_and_marked(tmp_path: Path) -> None:
    with (
        upstream(status(500)) as server,
        house(tmp_path, calibrated(tmp_path, during=0.2) + LOCAL + cloud(server.url) + task()) as here,
    ):
        answer = here.ask()
        assert answer.text == here.local.text()
        assert "500" in (answer.route.degraded or "")
        assert len(here.local.started) == 1  # the very answer that was held


def test_the_threshold_of_the_policy_counts(tmp_path: Path) -> None:
    policy = calibrated(tmp_path, during=0.2) + "threshold = 0.1\n" + LOCAL + cloud(NOWHERE) + task()
    with house(tmp_path, policy) as here:
        assert here.ask().tiers == ["local"]


def test_escalation_can_be_switched_off(tmp_path: Path) -> None:
    policy = calibrated(tmp_path, before=0.01, during=0.01) + LOCAL + cloud(NOWHERE) + task(escalate=False)
    with house(tmp_path, policy) as here:
        answer = here.ask()
        assert answer.tiers == ["local"]
        assert answer.route.degraded is None


def test_several_completions_are_not_judged(tmp_path: Path) -> None:
    policy = calibrated(tmp_path, before=0.01, during=0.01) + LOCAL + cloud(NOWHERE) + task()
    with house(tmp_path, policy) as here, here.start(params=SamplingParams(temperature=0, max_tokens=4, n=2)) as both:
        assert {chunk.index for chunk in both} == {0, 1}


def test_the_consistency_checker_forks_the_prompt(tmp_path: Path) -> None:
    policy = calibrated(tmp_path, during=0.9, consistent=0.2) + LOCAL
    slow = {"tokens": 4, "ms": 20000}
    with (
        upstream(answers(*AFAR)) as server,
        house(tmp_path, policy + cloud(server.url) + task(consistency=True, hold=slow)) as here,
    ):
        answer = here.ask()
        assert answer.tiers == ["cloud"]
        assert 0 <= float(answer.route.signals["agreement"] or 0) <= 1
        assert len(here.local.started) == 2
        asked = here.local.prepare(TierRequest(Messages(QUESTION), GREEDY)).prompt
        assert here.local.fake.engine.stats.prompt_tokens < 2 * len(asked.ids)  # type: ignore[union-attr]


def test_holding_ends_when_its_time_is_over(tmp_path: Path) -> None:
    policy = calibrated(tmp_path, during=0.9) + LOCAL + cloud(NOWHERE) + task(hold={"tokens": 1000, "ms": 100})
    with house(tmp_path, policy) as here:
        seen = threading.Event()
        here.local.gate.clear()
        with here.start() as generation:
            reader = threading.Thread(target=lambda: (next(generation), seen.set()))
            reader.start()
            time.sleep(0.3)
            assert not seen.is_set()  # there is nothing to judge yet
            here.local.gate.set()
            assert seen.wait(60)
            reader.join()


@pytest.mark.parametrize("problem", ["it repeats itself", "it declines to answer"])
def test_what_is_plainly_wrong_needs_no_calibration(
    problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PlainChecks, "problem", lambda self, text, tokens, ended, facts: problem)
    with (
        upstream(answers(*AFAR)) as server,
        house(tmp_path, LOCAL + cloud(server.url) + task()) as here,
    ):
        answer = here.ask()
        assert answer.tiers == ["cloud"]
        assert problem in answer.route.reason


# --- falling back -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [PromptTooLong("the prompt has 9 tokens"), Overloaded("queue full"), EngineError("the device is gone")]
)
def test_what_the_local_model_cannot_take_goes_on(error: Exception, tmp_path: Path) -> None:
    with (
        upstream(answers(*AFAR)) as server,
        house(tmp_path, LOCAL + cloud(server.url) + task(escalate=False)) as here,
    ):
        here.local.error = error  # type: ignore[assignment]
        answer = here.ask()
        assert answer.tiers == ["cloud"]
        assert str(error) in answer.route.reason


def test_a_prompt_too_long_for_one_tier_goes_to_one_that_holds_it(tmp_path: Path) -> None:
    with (
        upstream(answers(*AFAR)) as server,
        house(tmp_path, LOCAL + cloud(server.url) + task(), max_prompt=5) as here,
    ):
        answer = here.ask()
        assert answer.tiers == ["cloud"]
        assert "take 5" in answer.route.reasons["local"]


def test_if_none_holds_it_the_counts_are_told(tmp_path: Path) -> None:
    long = [{"role": "user", "content": "x" * 2000}]
    with (
        house(tmp_path, LOCAL + cloud(NOWHERE) + task(), max_prompt=5) as here,
        pytest.raises(PromptTooLong, match=r"the prompt has \d+ tokens, this model and device take 1000"),
    ):
        here.ask(long)


def test_what_nobody_understands_is_refused_by_name(tmp_path: Path) -> None:
    with (
        house(tmp_path, LOCAL + cloud(NOWHERE) + task(tiers=["local"])) as here,
        pytest.raises(InvalidRequest, match="tools is not supported by models here"),
    ):
        here.ask(about=About(extras={"tools": [{"type": "function"}]}))


@pytest.mark.parametrize(
    ("params", "why"),
    [
        ({"logit_bias": {5: 1.0}}, "logit_bias"),
        ({"logprobs": 1}, "logprobs"),
        ({"top_k": 5}, "it does not know top_k"),
    ],
)
def test_what_a_server_would_misunderstand_stays_here(params: Mapping[str, object], why: str, tmp_path: Path) -> None:
    with house(tmp_path, cloud(NOWHERE) + LOCAL + task(prefer="remote")) as here:
        answer = here.ask(params=SamplingParams(temperature=0, max_tokens=3, **params))  # type: ignore[arg-type]
        assert answer.tiers == ["local"]
        assert why in answer.route.reasons["cloud"]


def test_the_fault_of_the_request_is_not_passed_round(tmp_path: Path) -> None:
    with (
        upstream(answers(*AFAR)) as server,
        house(tmp_path, LOCAL + cloud(server.url) + task()) as here,
    ):
        here.local.error = InvalidRequest("no good", "prompt")
        with pytest.raises(InvalidRequest, match="no good"):
            here.ask()
        assert not server.asked


# --- offline ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefer", ["local", "remote"])
def test_offline_nothing_is_tried(prefer: str, tmp_path: Path) -> None:
    with (
        upstream(answers(*AFAR)) as server,
        house(tmp_path, cloud(server.url) + LOCAL + task(prefer=prefer), offline=True) as here,
    ):
        answer = here.ask()
        assert answer.tiers == ["local"]
        assert (answer.route.degraded is not None) == (prefer == "remote")
        assert "offline" in answer.route.reasons["cloud"]
        assert not server.asked
        assert here.dispatcher.health()["tiers"]["cloud"] == {
            "kind": "remote",
            "state": "off",
            "reason": "offline mode is on",
        }


def test_without_a_network_only_this_machine_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "_some_interface_is_up", lambda: False)
    with house(tmp_path, cloud("https://api.example.com/v1") + LOCAL + task(prefer="remote")) as here:
        started = time.monotonic()
        answer = here.ask()
        assert time.monotonic() - started < 2
        assert "there is no network" in (answer.route.degraded or "")
    with (
        upstream(answers(*AFAR)) as server,
        house(tmp_path, cloud(server.url) + LOCAL + task(prefer="remote")) as here,
    ):
        assert here.ask().tiers == ["cloud"]


def test_offline_and_alone_it_is_said(tmp_path: Path) -> None:
    with (
        house(tmp_path, cloud(NOWHERE) + LOCAL + task(tiers=["cloud"]), offline=True) as here,
        pytest.raises(TierUnavailable, match="offline mode is on"),
    ):
        here.ask()


# --- latency ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", ["ttft", "total"])
def test_a_tier_that_was_too_slow_comes_after_the_others(wanted: str, tmp_path: Path) -> None:
    def slow(client: Connection) -> None:
        time.sleep(0.4)
        client.send(stream(delta("late"), delta(finish="stop"), b"data: [DONE]\n\n"))

    with (
        upstream(slow) as server,
        house(tmp_path, cloud(server.url) + LOCAL + task(prefer="remote", latency={wanted: 100})) as here,
    ):
        assert here.ask().tiers == ["cloud"]
        answer = here.ask()
        assert answer.tiers == ["local"]
        assert "lately, the class wants 100" in answer.route.reasons["cloud"]


def test_closing_ends_what_runs(tmp_path: Path) -> None:
    with (
        upstream(stalls()) as server,
        house(tmp_path, cloud(server.url) + LOCAL + task(prefer="remote")) as here,
    ):
        generation = here.start()
        wait_until(lambda: server.asked)
        here.dispatcher.close()
        (chunk,) = list(generation)
        assert chunk.finish_reason == "cancelled"
