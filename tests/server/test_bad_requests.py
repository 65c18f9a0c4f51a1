"""Bad input: every field and every damaged body is refused as OpenAI's error, by name."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import pytest

from edge_runtime.server.app import ROUTES
from tests.server.served import CHAT, TEXT, FakeModel, error_of, schema_format, wait_until

MALFORMED: list[tuple[bytes, str]] = [
    (b"", "empty"),
    (b"{", "not valid JSON"),
    (b"nonsense", "not valid JSON"),
    (json.dumps({**CHAT, **TEXT}).encode() + b"{}", ""),
    (b'{"model": NaN}', "not valid JSON"),
    (b"[]", "object"),
    (b"null", "object"),
    (b'"\xff"', ""),
    (b'{"model": "\xff\xfe"}', "UTF-8"),
    (b'{"model": "\\ud800"}', ""),
    (b'{"model": "fake", "store": ' + b"[" * 40_000 + b"]" * 40_000 + b"}", "too deep|store"),
    (b"[" * 90_000, ""),
]


@pytest.mark.parametrize("path", [route.path for route in ROUTES if route.methods and "POST" in route.methods])
@pytest.mark.parametrize(("body", "words"), MALFORMED, ids=range(len(MALFORMED)))
def test_malformed_json(http: httpx.Client, path: str, body: bytes, words: str) -> None:
    response = http.post(path, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    told = response.json()["error"] if path.startswith("/api/") else error_of(response)["message"]  # Ollama's own form
    assert re.search(words, told)


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def tool(name: str = "f", **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **more}}


BAD_CHAT: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": "Hi"}, "messages"),
    ({"messages": ["Hi"]}, "messages[0]"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"content": "Hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "wizard", "content": "Hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "Hi", "mood": "good"}]}, "messages[0].mood"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
     "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "messages[0].tool_calls[0].function"),
    ({"messages": [{"role": "assistant", "tool_calls": [CALL | {"type": "custom"}]}]},
     "messages[0].tool_calls[0].type"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "messages[0].tool_calls"),
    ({"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]}, "messages[0].tool_call_id"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
    ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages[0].tool_call_id"),
    ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}, {"role": "assistant", "tool_calls": [CALL]}]},
     "messages[0].tool_call_id"),
    ({"messages": [{"role": "assistant", "tool_calls": []}]}, "messages[0].content"),
    ({"model": None}, "model"),
    ({"model": 3}, "model"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": 3}, "logprobs"),
    ({"max_tokens": None, "max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_tokens": None, "max_completion_tokens": 10_000}, "max_completion_tokens"),
    ({"max_completion_tokens": 5}, "max_tokens"),
    ({"tools": {}}, "tools"),
    ({"tools": "get_weather"}, "tools"),
    ({"tools": [{"type": "function"}]}, "tools[0]"),
    ({"tools": [tool() | {"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [tool("two words")]}, "tools[0].function.name"),
    ({"tools": [tool(), tool()]}, "tools"),
    ({"tools": [tool(f"t{number}") for number in range(129)]}, "tools"),
    ({"tools": [tool(parameters=[])]}, "tools[0]"),
    ({"tools": [tool(parameters={"type": "string"})]}, "tools[0].function.parameters"),
    ({"tools": [tool(parameters={"$ref": "#/none"})]}, "tools"),
    ({"tools": [tool(parameters={"not": {}}, strict=True)]}, "tools"),
    ({"tools": [tool()], "tool_choice": "always"}, "tool_choice"),
    ({"tools": [tool()], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
    ({"tools": [tool()], "tool_choice": {"type": "function"}}, "tool_choice"),
    ({"tools": [tool()], "parallel_tool_calls": 1}, "parallel_tool_calls"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"function_call": {"name": "f"}}, "function_call"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_object", "json_schema": {"name": "x"}}}, "response_format"),
    ({"response_format": {"type": "json_object", "schema": {}}}, "response_format.schema"),
    ({"response_format": {"type": "grammar", "definition": "a"}}, "response_format.syntax"),
    ({"response_format": {"type": "grammar", "syntax": "gbnf", "definition": "a"}}, "response_format.syntax"),
    ({"response_format": {"type": "grammar", "syntax": "lark"}}, "response_format.definition"),
    ({"response_format": {"type": "grammar", "syntax": "lark", "definition": "start: nothing"}}, "response_format"),
    ({"response_format": {"type": "grammar", "syntax": "regex", "definition": "(a"}}, "response_format"),
    ({"response_format": {"type": "json_object", "syntax": "lark"}}, "response_format"),
    ({"response_format": schema_format({}, "two words")}, "response_format.json_schema.name"),
    ({"response_format": schema_format({"type": "strin"})}, "response_format"),
    ({"response_format": schema_format({"not": {"type": "string"}})}, "response_format"),
    ({"response_format": schema_format({"$ref": "#/$defs/none"})}, "response_format"),
    ({"response_format": schema_format({"type": "integer", "minimum": 2, "maximum": 1})}, "response_format"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"prompt": "Hi"}, "prompt"),
    ({"echo": True}, "echo"),
]  # fmt: skip
BAD_TEXT: list[tuple[dict[str, Any], str]] = [
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt[0]"),
    ({"prompt": None}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": [[1], "a"]}, "prompt"),
    ({"prompt": [1.5]}, "prompt[0]"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [99999]}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": ["a"] * 129}, "prompt"),
    ({"echo": True}, "echo"),
    ({"suffix": "x"}, "suffix"),
    ({"best_of": 2}, "best_of"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"messages": []}, "messages"),
]
BAD_EITHER: list[tuple[dict[str, Any], str]] = [
    ({"tempurature": 1}, "tempurature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -1}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"presence_penalty": 2.1}, "presence_penalty"),
    ({"frequency_penalty": -2.1}, "frequency_penalty"),
    ({"seed": 2**70}, "seed"),
    ({"seed": "x"}, "seed"),
    ({"n": 0}, "n"),
    ({"n": 1000}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -5}, "max_tokens"),
    ({"max_tokens": 10_000}, "max_tokens"),
    ({"stop": ""}, "stop"),
    ({"stop": [1]}, "stop[0]"),
    ({"stop": ["a"] * 65}, "stop"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": {"258": 1}}, "logit_bias"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"other": True}}, "stream_options.other"),
    ({"store": True}, "store"),
    ({"user": 3}, "user"),
]


@pytest.mark.parametrize(
    ("path", "base", "change", "param"),
    [("/v1/chat/completions", CHAT, *case) for case in BAD_CHAT + BAD_EITHER]
    + [("/v1/completions", TEXT, *case) for case in BAD_TEXT + BAD_EITHER],
)
def test_bad_fields(http: httpx.Client, path: str, base: dict[str, Any], change: dict[str, Any], param: str) -> None:
    for stream in (False, True):
        response = http.post(path, json={"stream": stream, **base, **change} if stream else base | change)
        if stream and param in ("stream_options",):
            continue  # allowed with stream
        assert response.status_code == 400, response.text
        error = error_of(response)
        assert error["type"] == "invalid_request_error"
        assert error["param"] == param, error


def test_missing_fields(http: httpx.Client) -> None:
    assert error_of(http.post("/v1/chat/completions", json={"model": "fake"}))["param"] == "messages"
    assert error_of(http.post("/v1/completions", json={"prompt": "a"}))["param"] == "model"


def test_nothing_is_left_behind_by_bad_input(http: httpx.Client, model: FakeModel) -> None:
    wait_until(lambda: model.engine.stats.running == model.engine.stats.waiting == 0)
    assert http.post("/v1/chat/completions", json=CHAT).status_code == 200
    model.decoder.check_integrity()


def test_an_exploding_grammar_is_bounded(http: httpx.Client) -> None:
    """It is found out while the answer is made: an error then, soon, and others are answered."""
    form = {"type": "grammar", "syntax": "regex", "definition": "(((a{99}){99}){99}){99}"}
    response = http.post("/v1/chat/completions", json=CHAT | {"response_format": form})  # with a timeout of its own
    assert response.status_code == 400
    assert error_of(response)["param"] == "response_format"
    assert http.post("/v1/chat/completions", json=CHAT).status_code == 200
