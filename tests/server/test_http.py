"""HTTP as such: statuses, the event stream's bytes, keys and limits."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import openai
import pytest

from devices.base import Step
from devices.errors import EngineError
from edge_runtime.engine import Generation
from edge_runtime.errors import (
    BudgetError,
    ConfigError,
    ContextOverflow,
    EdgeError,
    EngineStopped,
    OutOfKVCache,
    Overloaded,
    PromptTooLong,
    StorageError,
)
from edge_runtime.prompts import NOTHING, About
from edge_runtime.sampling import SamplingParams
from edge_runtime.server.app import create_app
from edge_runtime.server.errors import failure_of
from edge_runtime.server.run import listen, serve
from tests.server.served import CHAT, TEXT, FakeModel, error_of, running, wait_until

# --- statuses ---------------------------------------------------------------------------------------------------------


def test_paths_and_methods(http: httpx.Client) -> None:
    missing = http.get("/v1/nothing")
    assert missing.status_code == 404
    assert "/v1/nothing" in error_of(missing)["message"]
    wrong = http.get("/v1/chat/completions")
    assert wrong.status_code == 405
    assert wrong.headers["allow"] == "POST"
    assert error_of(wrong)["code"] == "method_not_allowed"
    assert http.post("/v1/models").status_code == 405
    for answer in (http.get("/" + "a" * 9000), http.post("/v1/models/" + "a" * 9000)):
        assert len(error_of(answer)["message"]) < 500


def test_health(http: httpx.Client) -> None:
    response = http.get("/health")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})


def test_health_after_the_engine_stopped() -> None:
    model = FakeModel()
    with running(create_app(model)) as url:
        model.engine.close()
        assert httpx.get(f"{url}/health").status_code == 503
        response = httpx.post(f"{url}/v1/chat/completions", json=CHAT)
        assert response.status_code == 503
        assert error_of(response)["code"] == "engine_stopped"


def test_body_limit(http: httpx.Client, url: str) -> None:
    response = http.post("/v1/completions", json=TEXT | {"prompt": "x" * 100_001})
    assert response.status_code == 413
    assert "100000" in error_of(response)["message"]

    def endless() -> Iterator[bytes]:
        while True:
            yield b" " * 10_000

    with httpx.Client(base_url=url) as other:  # chunked: no length is declared
        try:
            response = other.post("/v1/completions", content=endless())
        except httpx.WriteError:
            return  # the server answered and hung up while we were still sending
        assert response.status_code == 413


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (PromptTooLong("long", "prompt"), 400, "context_length_exceeded"),
        (ContextOverflow("long"), 400, "context_length_exceeded"),
        (Overloaded("full", retry_after=2.4), 503, "overloaded"),
        (OutOfKVCache("full"), 503, "overloaded"),
        (EngineStopped("closed"), 503, "engine_stopped"),
        (BudgetError("too big"), 503, "out_of_memory_budget"),
        (EngineError("the engine failed"), 500, None),
        (StorageError("disk full"), 500, None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_refusals_of_the_engine(error: EdgeError, status: int, code: str | None, stream: bool) -> None:
    class Refusing(FakeModel):
        def start_chat(self, messages: Any, params: SamplingParams, about: About = NOTHING) -> Generation:
            raise error

    model = Refusing()
    with running(create_app(model)) as url:
        response = httpx.post(f"{url}/v1/chat/completions", json=CHAT | {"stream": stream})
    model.engine.close()
    assert response.status_code == status
    assert error_of(response)["code"] == code
    assert error_of(response)["message"] == str(error)
    expected = {Overloaded: "3", OutOfKVCache: "1"}.get(type(error))
    assert response.headers.get("retry-after") == expected


def test_every_error_of_the_tree_has_a_status() -> None:
    def leaves(kind: type[EdgeError]) -> list[type[EdgeError]]:
        return [leaf for child in kind.__subclasses__() for leaf in leaves(child)] or [kind]

    for kind in leaves(EdgeError):
        failure = failure_of(kind("why"))
        assert 400 <= failure.status <= 503
        assert failure.message == "why"


def test_a_bug_shows_no_traceback() -> None:
    class Broken(FakeModel):
        def start_chat(self, messages: Any, params: SamplingParams, about: About = NOTHING) -> Generation:
            raise KeyError("secret")

    model = Broken()
    with running(create_app(model)) as url:
        response = httpx.post(f"{url}/v1/chat/completions", json=CHAT)
    model.engine.close()
    assert response.status_code == 500
    assert "secret" not in response.text
    assert "internal error" in error_of(response)["message"]


def test_a_full_queue_is_503() -> None:
    gate = threading.Event()
    model = FakeModel(before_forward=lambda batch: bool(gate.wait()) and None, max_queue=1)
    running_request = model.start_completion("a", SamplingParams(max_tokens=1))
    wait_until(lambda: model.engine.stats.waiting == 0)
    waiting = model.start_completion("a", SamplingParams(max_tokens=1))
    with running(create_app(model)) as url:
        response = httpx.post(f"{url}/v1/completions", json=TEXT)
        gate.set()
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) >= 1
        with openai.OpenAI(base_url=f"{url}/v1", api_key="x") as client:
            assert client.completions.create(**TEXT).choices
    running_request.close()
    waiting.close()
    model.engine.close()


# --- the stream's bytes -----------------------------------------------------------------------------------------------


def test_event_stream_is_openais(http: httpx.Client) -> None:
    request = CHAT | {"stream": True, "temperature": 0, "stream_options": {"include_usage": True}}
    with http.stream("POST", "/v1/chat/completions", json=request) as response:
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        body = b"".join(response.iter_raw()).decode()
    *events, done, rest = body.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all(re.fullmatch(r"data: \{.*\}", event) for event in events)
    first, *middle, end, usage = [json.loads(event.removeprefix("data: ")) for event in events]
    assert first["choices"] == [
        {
            "index": 0,
            "delta": {"role": "assistant", "content": "", "refusal": None},
            "logprobs": None,
            "finish_reason": None,
        }
    ]
    assert middle
    for chunk in middle:
        (choice,) = chunk["choices"]
        assert set(choice) == {"index", "delta", "logprobs", "finish_reason"}
        assert set(choice["delta"]) == {"content"}
    assert end["choices"][0]["delta"] == {}
    assert end["choices"][0]["finish_reason"] in ("length", "stop")
    assert usage["choices"] == []
    assert {chunk["usage"] for chunk in (first, *middle, end) if chunk["usage"] is not None} == set()
    assert set(usage["usage"]) == {"prompt_tokens", "completion_tokens", "total_tokens", "prompt_tokens_details"}


@pytest.mark.parametrize("n", [1, 2])
def test_a_failure_in_mid_stream_is_an_event(n: int) -> None:
    steps = 0

    def fail_later(batch: Sequence[Step]) -> None:
        nonlocal steps
        steps += 1
        if steps > 5:
            raise EngineError("the device fell off")

    model = FakeModel(before_forward=fail_later)
    request = CHAT | {"stream": True, "max_tokens": 100, "n": n, "logit_bias": {"257": -100}}
    with running(create_app(model)) as url:
        response = httpx.post(f"{url}/v1/chat/completions", json=request)
        assert response.status_code == 200
        last = response.text.rstrip("\n").split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["message"] == "the device fell off"
        steps = 0
        with openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
            with pytest.raises(openai.APIError, match="fell off"), client.chat.completions.create(**request) as stream:
                list(stream)
            steps = 0
            with pytest.raises(openai.InternalServerError, match="fell off"):
                client.chat.completions.create(**request | {"stream": False})
    model.engine.close()


# --- the door ---------------------------------------------------------------------------------------------------------


def test_api_key() -> None:
    model = FakeModel()
    with running(create_app(model, api_key="s3cret")) as url, httpx.Client(base_url=url) as http:
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "s3cret"},
            {"authorization": "Basic s3cret"},
        ):
            response = http.post("/v1/chat/completions", json=CHAT, headers=headers)
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
            assert error_of(response)["code"] == "invalid_api_key"
            assert http.get("/v1/models", headers=headers).status_code == 401
            assert http.get("/v1/nothing", headers=headers).status_code == 401
        assert http.get("/v1/models", headers={"authorization": "Bearer s3cret"}).status_code == 200
        assert http.get("/health").status_code == 200
        with openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError):
                client.models.list()
            assert client.with_options(api_key="s3cret").chat.completions.create(**CHAT).choices
    model.engine.close()


def test_web_pages_are_kept_out(http: httpx.Client) -> None:
    page = {"origin": "https://example.com"}
    response = http.post("/v1/chat/completions", json=CHAT, headers=page)
    assert response.status_code == 403
    assert "Origin" in error_of(response)["message"]
    for answer in (response, http.get("/v1/models", headers=page), http.options("/v1/chat/completions", headers=page)):
        assert not [name for name in answer.headers if name.startswith("access-control-")]


@pytest.mark.parametrize("key", ["", "with space", "schlüssel", "new\nline"])
def test_keys_that_cannot_be_sent(model: FakeModel, key: str) -> None:
    with pytest.raises(ConfigError):
        create_app(model, api_key=key)


def test_open_to_the_network_needs_a_key(model: FakeModel) -> None:
    for host in ("0.0.0.0", "::", "192.168.1.2", "example.com", ""):
        with pytest.raises(ConfigError, match="API key"):
            serve(create_app(model), host, 0)
    for allowed in (
        listen(create_app(model, api_key="k"), "0.0.0.0", 0),
        listen(create_app(model), "0.0.0.0", 0, allow_open=True),
        listen(create_app(model), "localhost", 0),
    ):
        allowed.close()


def test_a_taken_port_is_named(model: FakeModel) -> None:
    with listen(create_app(model), "127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(ConfigError, match=str(port)):
            listen(create_app(model), "127.0.0.1", port)
    with pytest.raises(ConfigError, match="99999"):
        listen(create_app(model), "127.0.0.1", 99999)


def test_models_must_have_names_of_their_own(model: FakeModel) -> None:
    with pytest.raises(ConfigError):
        create_app([model, model])
    with pytest.raises(ConfigError):
        create_app([])


def test_models_say_where_they_run_and_why(http: httpx.Client) -> None:
    expected = {"device": "fake:cpu", "variant": "fake-fp32", "reason": "there is no other"}
    assert http.get("/v1/models").json()["data"][0]["placement"] == expected
    assert http.get("/v1/models/fake").json()["placement"] == expected


def test_several_models() -> None:
    first, second = FakeModel("org/first"), FakeModel("second:1b")
    with running(create_app([first, second])) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="x") as client:
        assert [model.id for model in client.models.list().data] == ["org/first", "second:1b"]
        for name in ("org/first", "second:1b"):
            assert httpx.get(f"{url}/v1/models/{name}").json()["id"] == name
            assert client.chat.completions.create(**CHAT | {"model": name}).model == name
        with pytest.raises(openai.NotFoundError, match="org/first, second:1b"):
            client.chat.completions.create(**CHAT)
    first.engine.close()
    second.engine.close()
