"""Tools through the server and the official client: whatever the model thinks, a forced call is valid."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from edge_runtime.sampling import SamplingParams
from tests.server.served import FakeModel, error_of

WEATHER = {
    "type": "object",
    "properties": {"unit": {"enum": ["C", "F"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["unit", "days"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "w", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "t"}},
]
ASK: dict[str, Any] = {"model": "fake", "messages": [{"role": "user", "content": "Hi"}], "seed": 1}


@pytest.fixture(scope="module")
def model() -> Iterator[FakeModel]:
    """With room for tools and schemas in its prompts."""
    model = FakeModel(max_context=2048)
    yield model
    model.engine.close()


@pytest.mark.parametrize(
    ("choice", "names"),
    [("required", {"w", "t"}), ({"type": "function", "function": {"name": "w"}}, {"w"})],
    ids=["required", "named"],
)
def test_forced(client: openai.OpenAI, choice: Any, names: set[str]) -> None:
    for seed in range(4):
        answer = client.chat.completions.create(
            **{**ASK, "seed": seed}, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False
        )
        (only,) = answer.choices
        assert only.finish_reason == "tool_calls"
        assert only.message.content is None
        (call,) = only.message.tool_calls or ()
        assert call.type == "function"
        assert call.function.name in names
        arguments = json.loads(call.function.arguments)
        if call.function.name == "w":
            assert arguments["unit"] in ("C", "F")
            assert 1 <= arguments["days"] <= 9
        else:
            assert arguments == {}


def test_a_stream_says_the_same(client: openai.OpenAI) -> None:
    wish: dict[str, Any] = {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "w"}}}
    whole = client.chat.completions.create(**ASK, **wish).choices[0].message.tool_calls
    assert whole is not None
    names, ids, arguments, finish = [], [], "", None
    for event in client.chat.completions.create(**ASK, **wish, stream=True):
        (choice,) = event.choices
        finish = choice.finish_reason or finish
        assert not choice.delta.content
        for call in choice.delta.tool_calls or ():
            assert call.index == 0
            assert call.function is not None
            names += [call.function.name] if call.function.name else []
            ids += [call.id] if call.id else []
            arguments += call.function.arguments or ""
    assert (names, len(ids), finish) == (["w"], 1, "tool_calls")
    assert arguments == whole[0].function.arguments  # type: ignore[union-attr]


def test_several_completions(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**ASK, tools=TOOLS, tool_choice="required", n=3)
    for choice in answer.choices:
        assert choice.finish_reason == "tool_calls"
        assert choice.message.tool_calls
        for call in choice.message.tool_calls:
            json.loads(call.function.arguments)  # type: ignore[union-attr]


def test_cut_off(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**ASK, tools=TOOLS, tool_choice="required", max_tokens=40)
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize("choice", ["none", "auto"])
def test_free_text(client: openai.OpenAI, url: str, choice: Any) -> None:
    """The model has no word for a call's opening, so it answers in text."""
    answer = client.chat.completions.create(**ASK, tools=TOOLS, tool_choice=choice, max_tokens=30)
    message = answer.choices[0].message
    assert message.content
    assert message.tool_calls is None
    plain = client.chat.completions.create(**ASK, max_tokens=30)
    assert (message.content == plain.choices[0].message.content) == (choice == "none")  # it is not told of tools then


def test_a_whole_conversation(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(**ASK, tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    (call,) = first.choices[0].message.tool_calls or ()
    talk: Any = [
        {"role": "developer", "content": "Be short."},
        *ASK["messages"],
        first.choices[0].message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": [{"type": "text", "text": "7"}]},
    ]
    answer = client.chat.completions.create(model="fake", messages=talk, tools=TOOLS, max_tokens=10)
    assert answer.choices[0].message.content


def test_a_form_or_a_call(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    message = client.chat.completions.create(**ASK, tools=TOOLS, response_format=form).choices[0].message
    if message.tool_calls:
        json.loads(message.tool_calls[0].function.arguments)  # type: ignore[union-attr]
    else:
        assert set(json.loads(message.content or "")) == {"a"}


def test_refused(url: str) -> None:
    refused = httpx.post(f"{url}/v1/chat/completions", json=ASK | {"tools": [TOOLS[0], TOOLS[0]]})
    assert refused.status_code == 400
    assert error_of(refused)["param"] == "tools"


def test_others_are_not_disturbed(client: openai.OpenAI) -> None:
    model = FakeModel(max_context=2048)
    try:
        expected, _ = model.answer(ASK["messages"], SamplingParams(seed=1, max_tokens=20))
    finally:
        model.engine.close()
    assert client.chat.completions.create(**ASK, max_tokens=20).choices[0].message.content == expected
