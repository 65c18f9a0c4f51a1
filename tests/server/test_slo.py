"""Latency targets, as the server and the command line tell of them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from edge_runtime.cli.main import main
from edge_runtime.generation import Generation
from edge_runtime.server.app import create_app
from edge_runtime.tracing.recorder import Recorder
from tests.server.served import CHAT as PLAIN
from tests.server.served import FakeModel, running, wait_until
from tests.server.test_metrics import value
from tests.server.test_tiers import CHAT
from tests.tiers.house import LOCAL, TieredModel, cloud, house, task
from tests.tiers.upstream import DONE, Connection, answers, delta, says, status, upstream
from tests.tiers.upstream import stream as events

TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
TOOL_CALL = delta(tool_calls=[{"index": 0, "id": "call_1", "function": {"name": "look", "arguments": "{}"}}])
NEVER, ALWAYS = {"ttft": 0.001}, {"ttft": 60_000.0, "total": 60_000.0}


def ask(url: str, **more: object) -> None:
    """One request, until it has been counted."""
    before = sum(each["requests"] for each in httpx.get(f"{url}/slo").json()["classes"])
    response = httpx.post(f"{url}/v1/chat/completions", json=CHAT | more)
    assert response.status_code == 200, response.text
    wait_until(lambda: sum(each["requests"] for each in httpx.get(f"{url}/slo").json()["classes"]) == before + 1)


def slowly(client: Connection) -> None:
    time.sleep(0.05)
    answers("from ", "afar")(client)


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    classes = task(name="quick", latency=NEVER, match={"field": {"user": "hasty"}}) + task(latency=ALWAYS)
    with house(tmp_path, LOCAL + classes) as here, running(create_app(TieredModel(here))) as url:
        yield url


def test_met_and_missed(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["slo", "--url", url]) == 0
    assert capsys.readouterr().out == "no request of a class with a latency target has ended yet\n"
    for more in ({}, {"stream": True}, {"user": "hasty"}):
        ask(url, **more)
    report = httpx.get(f"{url}/slo").json()
    told = {each["class"]: each for each in report["classes"]}
    assert (told["all"]["requests"], told["all"]["share"], told["all"]["missed"]) == (2, 1.0, {})
    assert (told["all"]["wanted_ttft_ms"], told["all"]["wanted_total_ms"]) == (60_000, 60_000)
    assert (told["quick"]["requests"], told["quick"]["met"]) == (1, 0)
    (miss,) = report["misses"]
    assert told["quick"]["missed"] == {miss["reason"]: 1}
    assert miss["ttft_ms"] > 0.001
    assert miss["tier"] == "local"
    counted = httpx.get(f"{url}/metrics").text
    assert 'edge_glm_latency_objectives_total{outcome="met",task_class="all"} 2.0' in counted
    assert f'edge_glm_latency_objectives_total{{outcome="{miss["reason"]}",task_class="quick"}} 1.0' in counted

    assert main(["slo", "--url", url]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["class", "wants", "requests", "met", "missed", "for"]
    assert lines[1][-2:] == ["2", "100.0%"]
    assert "0.0%" in lines[2]
    assert lines[-1][1:3] == ["quick", "local"]
    assert main(["slo", "--url", url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == httpx.get(f"{url}/slo").json()


def test_a_tier_that_does_not_answer_and_one_that_is_slow(tmp_path: Path) -> None:
    classes = task(prefer="remote", latency=NEVER)
    for server_does, reason in ((status(503), "fell back"), (slowly, "elsewhere")):
        folder = tmp_path / reason
        folder.mkdir()
        with (
            upstream(server_does) as server,
            house(folder, cloud(server.url) + LOCAL + classes) as here,
            running(create_app(TieredModel(here))) as url,
        ):
            ask(url, stream=True)
            (told,) = httpx.get(f"{url}/slo").json()["classes"]
            assert told["missed"] == {reason: 1}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("said", "tokens"), [([TOOL_CALL, delta(finish="tool_calls")], 1), ([delta(finish="stop")], 0)]
)
def test_an_answer_without_text_is_not_late_for_that(
    said: list[bytes], tokens: int, stream: bool, tmp_path: Path
) -> None:
    """A call of a tool is something; of an answer that is empty its end counts."""
    with (
        upstream(says(events(*said, DONE))) as server,
        house(tmp_path, cloud(server.url) + LOCAL + task(prefer="remote", latency={"ttft": 60_000.0})) as here,
        running(create_app(TieredModel(here))) as url,
    ):
        ask(url, tools=TOOLS, stream=stream)
        (told,) = httpx.get(f"{url}/slo").json()["classes"]
        assert (told["requests"], told["missed"]) == (1, {})
        counted = value(httpx.get(f"{url}/metrics").text, "edge_glm_time_to_first_token_seconds_count", model="fake")
        assert counted == tokens


def test_where_nobody_answers(tmp_path: Path) -> None:
    policy = task(prefer="remote", latency=ALWAYS, tiers=["cloud"])
    with (
        upstream(status(503)) as server,
        house(tmp_path, LOCAL + cloud(server.url) + policy) as here,
        running(create_app(TieredModel(here))) as url,
    ):
        assert httpx.post(f"{url}/v1/chat/completions", json=CHAT).status_code >= 500
        wait_until(lambda: bool(httpx.get(f"{url}/slo").json()["classes"]))
        (told,) = httpx.get(f"{url}/slo").json()["classes"]
        assert (told["share"], told["missed"]) == (0.0, {"failed": 1})


@pytest.mark.parametrize("stream", [False, True])
def test_what_was_the_requests_own_fault_does_not_count(stream: bool, tmp_path: Path) -> None:
    recorder = Recorder()
    policy = task(prefer="remote", latency=ALWAYS, tiers=["cloud"])
    with (
        upstream(status(422)) as server,
        house(tmp_path, LOCAL + cloud(server.url) + policy) as here,
        running(create_app(TieredModel(here), recorder=recorder)) as url,
    ):
        assert httpx.post(f"{url}/v1/chat/completions", json=CHAT | {"stream": stream}).status_code == 400
        wait_until(lambda: recorder.ring.newest(1))
        assert recorder.ring.newest(1)[0].about["outcome"] == "refused"
        assert httpx.get(f"{url}/slo").json() == {"classes": [], "misses": []}


@pytest.mark.parametrize("stream", [False, True])
def test_what_shutting_down_cuts_off_has_failed(stream: bool) -> None:
    recorder = Recorder()
    model = FakeModel()
    start = model.start_chat

    def cut_off(*given: Any) -> Generation:
        generation = start(*given)
        generation.cancel()
        return generation

    model.start_chat = cut_off  # type: ignore[method-assign]
    body = PLAIN | {"stream": stream, "max_tokens": 400, "ignore_eos": True}
    with running(create_app(model, recorder=recorder)) as url:
        assert "cut off" in httpx.post(f"{url}/v1/chat/completions", json=body).text
        wait_until(lambda: recorder.ring.newest(1))
        assert recorder.ring.newest(1)[0].about["outcome"] == "failed"
    model.close()


def test_without_targets_nothing_is_counted(tmp_path: Path) -> None:
    with house(tmp_path, LOCAL + task()) as here, running(create_app(TieredModel(here))) as url:
        assert httpx.post(f"{url}/v1/chat/completions", json=PLAIN).status_code == 200
        wait_until(lambda: httpx.get(f"{url}/traces").json()["data"])  # where it is kept it has been looked at
        assert httpx.get(f"{url}/slo").json() == {"classes": [], "misses": []}
