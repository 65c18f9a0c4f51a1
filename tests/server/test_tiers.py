"""A model with a policy over HTTP: who answered, what failed, and how things stand."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from edge_runtime.server.app import create_app
from tests.server.served import error_of, running, wait_until
from tests.server.test_leaving import sent
from tests.tiers.house import LOCAL, House, TieredModel, cloud, house, task
from tests.tiers.upstream import DONE, Connection, answers, delta, says, stalls, status, stream, upstream

CHAT: dict[str, Any] = {
    "model": "fake",
    "messages": [{"role": "user", "content": "what is it?"}],
    "temperature": 0,
    "max_tokens": 12,
}
AWAY = LOCAL + task(prefer="remote")


@contextmanager
def served(folder: Path, policy: str, **options: Any) -> Iterator[tuple[House, str]]:
    with house(folder, policy, **options) as here, running(create_app(TieredModel(here))) as url:
        yield here, url


@pytest.mark.parametrize("streaming", [False, True])
def test_headers_say_who_answered_and_why(streaming: bool, tmp_path: Path) -> None:
    with upstream(answers("from ", "afar")) as server, served(tmp_path, cloud(server.url) + AWAY) as (_, url):
        response = httpx.post(f"{url}/v1/chat/completions", json=CHAT | {"stream": streaming})
        assert response.status_code == 200
        assert "from " in response.text
        assert response.headers["x-edge-glm-tier"] == "cloud"
        assert response.headers["x-edge-glm-route"].startswith('class="all", reason="')


def test_without_a_policy_too(url: str) -> None:
    response = httpx.post(f"{url}/v1/chat/completions", json=CHAT)
    assert response.headers["x-edge-glm-tier"] == "local"
    assert response.headers["x-edge-glm-route"] == 'reason="there is no other tier"'
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}


@pytest.mark.parametrize("streaming", [False, True])
def test_a_degraded_answer_is_marked(streaming: bool, tmp_path: Path) -> None:
    with upstream(status(503)) as server, served(tmp_path, cloud(server.url) + AWAY) as (_, url):
        response = httpx.post(f"{url}/v1/chat/completions", json=CHAT | {"stream": streaming})
        assert response.headers["x-edge-glm-tier"] == "local"
        assert 'degraded="cloud answers 503' in response.headers["x-edge-glm-route"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("script", "code", "name"), [(status(500), 502, "tier_failed"), (status(422), 400, "tier_refused")]
)
def test_what_fails_before_the_first_word_is_a_status(
    script: Any, code: int, name: str, streaming: bool, tmp_path: Path
) -> None:
    policy = LOCAL + task(tiers=["cloud"])
    with upstream(script) as server, served(tmp_path, cloud(server.url) + policy) as (_, url):
        response = httpx.post(f"{url}/v1/chat/completions", json=CHAT | {"stream": streaming})
        assert response.status_code == code
        assert error_of(response)["code"] == name


def test_offline_alone_is_503(tmp_path: Path) -> None:
    policy = cloud("http://localhost:9/v1") + LOCAL + task(tiers=["cloud"])
    with served(tmp_path, policy, offline=True) as (_, url):
        response = httpx.post(f"{url}/v1/chat/completions", json=CHAT)
        assert response.status_code == 503
        assert error_of(response)["code"] == "tier_unavailable"


def test_what_breaks_off_is_an_error_event_without_done(tmp_path: Path) -> None:
    script = says(stream(delta("half an ans")))
    with upstream(script) as server, served(tmp_path, cloud(server.url) + AWAY) as (_, url):
        text = httpx.post(f"{url}/v1/chat/completions", json=CHAT | {"stream": True}).text
        assert "half an ans" in text
        assert '"code":"tier_failed"' in text
        assert "[DONE]" not in text


def test_what_a_local_model_went_on_with_is_marked_in_the_stream(tmp_path: Path) -> None:
    script = says(stream(delta("half an ans")))
    policy = LOCAL + task(prefer="remote", broken_stream="continue")
    with upstream(script) as server, served(tmp_path, cloud(server.url) + policy) as (_, url):
        response = httpx.post(f"{url}/v1/chat/completions", json=CHAT | {"stream": True})
        assert response.headers["x-edge-glm-tier"] == "cloud"
        assert '"edge_glm":{"tier":"local","continued":"local went on after 11 characters' in response.text
        assert response.text.endswith("data: [DONE]\n\n")


def test_health_shows_the_tiers(tmp_path: Path) -> None:
    rule = {"failures": 1, "cooldown": 60}
    with upstream(status(500)) as server, served(tmp_path, cloud(server.url, breaker=rule) + AWAY) as (here, url):
        assert httpx.get(f"{url}/health").json() == {
            "status": "ok",
            "models": {
                "fake": {
                    "tiers": {
                        "cloud": {"kind": "remote", "state": "closed"},
                        "local": {"kind": "local", "state": "ready"},
                    }
                }
            },
        }
        httpx.post(f"{url}/v1/chat/completions", json=CHAT)
        told = httpx.get(f"{url}/health").json()["models"]["fake"]["tiers"]["cloud"]
        assert told["state"] == "open"
        assert "500" in told["reason"]
        here.write("broken")
        told = httpx.get(f"{url}/health").json()["models"]["fake"]
        assert "cannot read the policy" in told["policy"]


def test_headers_metadata_and_fields_choose_the_class(tmp_path: Path) -> None:
    policy = cloud("http://localhost:9/v1") + LOCAL
    for name, match in {
        "by-header": {"header": {"X-Task": "note"}},
        "by-metadata": {"metadata": {"task": "note"}},
        "by-user": {"field": {"user": "anna"}},
        "rest": {},
    }.items():
        policy += task(name=name, match=match, privacy="local-only")
    with served(tmp_path, policy) as (_, url):

        def found(headers: dict[str, str] | None = None, **more: Any) -> str:
            response = httpx.post(f"{url}/v1/chat/completions", json=CHAT | more, headers=headers or {})
            return response.headers["x-edge-glm-route"].partition(",")[0]

        assert found({"x-task": "note"}) == 'class="by-header"'
        assert found(metadata={"task": "note"}) == 'class="by-metadata"'
        assert found(user="anna") == 'class="by-user"'
        assert found(user="eva") == 'class="rest"'


TOOLS: Any = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]


def calls_a_tool(client: Connection) -> None:
    assert client.asked.body["tools"] == TOOLS
    call = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": ""}}
    pieces = [{"index": 0, "function": {"arguments": text}} for text in ('{"city": ', '"Bern"}')]
    parts = [delta(tool_calls=[each]) for each in (call, *pieces)]
    client.send(stream(*parts, delta(finish="tool_calls"), DONE))


@pytest.mark.parametrize("streaming", [False, True])
def test_tools_go_to_the_tier_that_knows_them(streaming: bool, tmp_path: Path) -> None:
    with (
        upstream(calls_a_tool) as server,
        served(tmp_path, LOCAL + cloud(server.url) + task()) as (_, url),
        openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client,
    ):
        messages: Any = CHAT["messages"]
        if streaming:
            events = list(client.chat.completions.create(model="fake", messages=messages, tools=TOOLS, stream=True))
            arguments = "".join(
                call.function.arguments or ""
                for each in events
                for call in each.choices[0].delta.tool_calls or ()
                if call.function
            )
            assert events[-1].choices[0].finish_reason == "tool_calls"
        else:
            choice = client.chat.completions.create(model="fake", messages=messages, tools=TOOLS).choices[0]
            assert choice.finish_reason == "tool_calls"
            assert choice.message.content is None
            (call,) = choice.message.tool_calls or ()
            assert call.id == "call_1"
            assert call.type == "function"
            arguments = call.function.arguments
        assert arguments == '{"city": "Bern"}'


def test_what_tools_have_answered_goes_there_too(tmp_path: Path) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}
    talk = [
        {"role": "user", "content": "how is the weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    with (
        upstream(answers("it rains")) as server,
        served(tmp_path, LOCAL + cloud(server.url) + task()) as (_, url),
    ):
        response = httpx.post(f"{url}/v1/chat/completions", json=CHAT | {"messages": talk, "tools": TOOLS})
        assert response.json()["choices"][0]["message"]["content"] == "it rains"
        assert server.asked[0].body["messages"] == talk
        del talk[2]["tool_call_id"]
        response = httpx.post(f"{url}/v1/chat/completions", json=CHAT | {"messages": talk})
        assert error_of(response)["param"] == "messages[2].tool_call_id"


def test_tools_are_refused_where_no_tier_knows_them(tmp_path: Path) -> None:
    with served(tmp_path, LOCAL) as (_, there):
        response = httpx.post(f"{there}/v1/chat/completions", json=CHAT | {"tools": TOOLS})
        assert response.status_code == 400
        assert "tools is not supported by models here" in error_of(response)["message"]


def test_a_prompt_that_no_tier_holds_is_400_with_the_counts(tmp_path: Path) -> None:
    with served(tmp_path, LOCAL, max_prompt=5) as (_, url):
        response = httpx.post(f"{url}/v1/chat/completions", json=CHAT)
        assert response.status_code == 400
        assert error_of(response)["code"] == "context_length_exceeded"
        assert "take 5" in error_of(response)["message"]


def test_plain_text_goes_where_it_is_understood(tmp_path: Path) -> None:
    text = {"model": "fake", "prompt": "Once", "max_tokens": 4}

    def completes(client: Connection) -> None:
        assert client.asked.path == "/v1/completions"
        said = b'data: {"choices": [{"index": 0, "text": " upon", "finish_reason": "stop"}]}\n\n'
        client.send(stream(said, DONE))

    with upstream(completes) as server:
        for knows, tier in ((True, "cloud"), (False, "local")):
            with served(tmp_path, cloud(server.url, completions=knows) + AWAY) as (_, url):
                response = httpx.post(f"{url}/v1/completions", json=text)
                assert response.headers["x-edge-glm-tier"] == tier


def test_a_client_that_leaves_ends_the_request_at_the_tier(tmp_path: Path) -> None:
    with upstream(stalls(stream(delta("begun")))) as server, served(tmp_path, cloud(server.url) + AWAY) as (_, url):
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=CHAT | {"stream": True}) as response:
            assert response.headers["x-edge-glm-tier"] == "cloud"
        assert server.left.acquire(timeout=5)


@pytest.mark.parametrize("streaming", [False, True])
def test_who_leaves_before_the_first_word_is_no_failure(
    streaming: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with upstream(stalls(b"")) as server, served(tmp_path, cloud(server.url) + AWAY) as (_, url):
        with sent(url, "/v1/chat/completions", CHAT | {"stream": streaming}):
            wait_until(lambda: server.asked)
        assert server.left.acquire(timeout=60)
    gc.collect()  # futures complain when they go
    assert [record for record in caplog.records if record.name == "asyncio"] == []
