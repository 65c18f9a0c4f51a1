"""Ollama's API: chats and prompts, streamed and whole, and what desktop programs ask before."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from edge_runtime.server.app import create_app
from tests.server.served import FakeModel, running

HELLO = [{"role": "user", "content": "Hi"}]
OPTIONS = {"temperature": 0, "num_predict": 12, "num_ctx": 4096}
TOOL = {
    "type": "function",
    "function": {
        "name": "w",
        "parameters": {"type": "object", "properties": {"u": {"enum": ["C"]}}, "required": ["u"]},
    },
}


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    model = FakeModel(max_context=2048)
    with running(create_app(model)) as url, httpx.Client(base_url=url) as client:
        yield client
    model.engine.close()


def lines(http: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    with http.stream("POST", path, json=body) as response:
        assert response.status_code == 200
        assert response.headers["content-type"] == "application/x-ndjson"
        return [json.loads(line) for line in response.iter_lines()]


def test_a_chat(http: httpx.Client) -> None:
    body = {"model": "fake", "messages": HELLO, "options": OPTIONS}
    whole = http.post("/api/chat", json=body | {"stream": False}).json()
    expected = http.post(
        "/v1/chat/completions", json={"model": "fake", "messages": HELLO, "temperature": 0, "max_tokens": 12}
    ).json()
    assert whole["message"] == {"role": "assistant", "content": expected["choices"][0]["message"]["content"]}
    assert whole["done"] is True
    assert whole["done_reason"] == expected["choices"][0]["finish_reason"]
    assert whole["prompt_eval_count"] == expected["usage"]["prompt_tokens"]
    assert whole["eval_count"] == expected["usage"]["completion_tokens"]
    assert 0 < whole["eval_duration"] <= whole["total_duration"]

    *pieces, last = lines(http, "/api/chat", body)
    assert "".join(piece["message"]["content"] for piece in pieces) == whole["message"]["content"]
    assert not any(piece["done"] for piece in pieces)
    assert (last["done"], last["eval_count"]) == (True, whole["eval_count"])


def test_a_prompt(http: httpx.Client) -> None:
    body = {"model": "fake:latest", "prompt": "Hi", "options": OPTIONS}
    chat = http.post("/api/chat", json={"model": "fake", "messages": HELLO, "options": OPTIONS, "stream": False}).json()
    whole = http.post("/api/generate", json=body | {"stream": False}).json()
    assert whole["response"] == chat["message"]["content"]
    *pieces, last = lines(http, "/api/generate", body)
    assert "".join(piece["response"] for piece in pieces) == whole["response"]
    assert last["done_reason"] == whole["done_reason"]
    raw = http.post("/api/generate", json=body | {"raw": True, "stream": False}).json()
    text = {"model": "fake", "prompt": "Hi", "temperature": 0, "max_tokens": 12}
    assert raw["response"] == http.post("/v1/completions", json=text).json()["choices"][0]["text"]
    told = http.post("/api/generate", json=body | {"system": "Be short.", "stream": False}).json()
    assert told["prompt_eval_count"] > whole["prompt_eval_count"]


def test_a_form(http: httpx.Client) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    body = {"model": "fake", "messages": HELLO, "format": schema, "stream": False}
    assert set(json.loads(http.post("/api/chat", json=body).json()["message"]["content"])) == {"a"}
    body = {"model": "fake", "prompt": "Hi", "format": "json", "stream": False, "options": {"num_predict": 5}}
    assert http.post("/api/generate", json=body).json()["response"].startswith("{")


def test_tools(http: httpx.Client) -> None:
    call = {"function": {"name": "w", "arguments": {"u": "C"}}}
    talk = [
        *HELLO,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "7", "tool_name": "w"},
    ]
    body = {"model": "fake", "messages": talk, "tools": [TOOL], "stream": False, "options": OPTIONS}
    answer = http.post("/api/chat", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["message"]["content"]


def test_loading(http: httpx.Client) -> None:
    for path, body in (("/api/chat", {"messages": []}), ("/api/generate", {"prompt": ""})):
        answer = http.post(path, json={"model": "fake", "keep_alive": "5m", **body}).json()
        assert (answer["done"], answer["done_reason"]) == (True, "load")


def test_models(http: httpx.Client) -> None:
    (model,) = http.get("/api/tags").json()["models"]
    assert model["name"] == model["model"] == "fake"
    assert model["details"]["parameter_size"] == "135M"
    assert model["size"] > 0
    shown = http.post("/api/show", json={"model": "fake"}).json()
    assert shown["model_info"]["llama.context_length"] == 2048
    assert set(shown["capabilities"]) == {"completion", "tools"}
    assert [each["name"] for each in http.get("/api/ps").json()["models"]] == ["fake"]
    assert http.get("/api/version").json()["version"].count(".") == 2


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/api/chat", {"model": "other", "messages": HELLO}, 404, "'other' is not served here"),
        ("/api/chat", {"messages": HELLO}, 400, "model is missing"),
        ("/api/chat", {"model": "fake", "messages": [{"role": "wizard"}]}, 400, "messages[0].role"),
        ("/api/chat", {"model": "fake", "messages": [{"role": "user", "images": ["x"]}]}, 400, "only text"),
        ("/api/chat", {"model": "fake", "messages": HELLO, "options": {"mirostat": 1}}, 400, "options.mirostat"),
        ("/api/chat", {"model": "fake", "messages": HELLO, "options": {"num_predict": "x"}}, 400, "num_predict"),
        ("/api/chat", {"model": "fake", "messages": HELLO, "options": {"top_p": 3}}, 400, "top_p"),
        ("/api/chat", {"model": "fake", "messages": HELLO, "format": "xml"}, 400, "format must be json"),
        ("/api/chat", {"model": "fake", "messages": HELLO, "format": {"type": "strin"}}, 400, "grammar"),
        ("/api/chat", {"model": "fake", "messages": HELLO, "think": True}, 400, "think is not supported"),
        ("/api/chat", {"model": "fake", "messages": HELLO, "tools": [{"type": "x"}]}, 400, "tools[0]"),
        ("/api/generate", {"model": "fake", "prompt": "x", "suffix": "y"}, 400, "suffix is not supported"),
        ("/api/generate", {"model": "fake", "prompt": "x" * 3000, "raw": True}, 400, "2048"),
        ("/api/show", {}, 400, "model is missing"),
    ],
)
def test_errors_are_as_their_clients_read_them(
    http: httpx.Client, path: str, body: dict[str, Any], status: int, words: str
) -> None:
    answer = http.post(path, json=body)
    assert (answer.status_code, set(answer.json())) == (status, {"error"}), answer.text
    assert words in answer.json()["error"]
