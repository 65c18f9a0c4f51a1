"""/v1/responses by the official client: whole, streamed, in a conversation, with tools and forms."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from edge_runtime.server.response_store import MOST, ResponseStore
from tests.server.served import FakeModel, error_of

TOOL: Any = {
    "type": "function",
    "name": "w",
    "description": None,
    "strict": None,
    "parameters": {
        "type": "object",
        "properties": {"unit": {"enum": ["C", "F"]}},
        "required": ["unit"],
        "additionalProperties": False,
    },
}


FORM: Any = {
    "format": {
        "type": "json_schema",
        "name": "x",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {"a": {"type": "boolean"}},
            "required": ["a"],
            "additionalProperties": False,
        },
    }
}

LOGPROBS: Any = ["message.output_text.logprobs"]


@pytest.fixture(scope="module")
def model() -> Iterator[FakeModel]:
    """With room for tools and schemas in its prompts."""
    model = FakeModel(max_context=2048)
    yield model
    model.engine.close()


def create(client: openai.OpenAI, **more: Any) -> Any:
    return client.responses.create(
        **{"model": "fake", "input": "Hi", "temperature": 0, "max_output_tokens": 12, **more}
    )


def test_whole(client: openai.OpenAI) -> None:
    response = create(client, metadata={"a": "b"}, instructions="Be short.")
    chat = client.chat.completions.create(
        model="fake",
        messages=[{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}],
        temperature=0,
        max_tokens=12,
    )
    assert response.output_text == chat.choices[0].message.content
    assert response.status == ("incomplete" if chat.choices[0].finish_reason == "length" else "completed")
    assert response.usage is not None
    assert chat.usage is not None
    assert response.usage.input_tokens == chat.usage.prompt_tokens
    assert response.usage.output_tokens == chat.usage.completion_tokens
    assert response.metadata == {"a": "b"}
    assert response.instructions == "Be short."


def test_a_stream_is_the_same_in_pieces(client: openai.OpenAI) -> None:
    whole = create(client)
    events = list(create(client, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:-1] == ["response.output_text.done", "response.content_part.done", "response.output_item.done"]
    assert kinds[-1] in ("response.completed", "response.incomplete")
    deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    last = events[-1].response
    assert deltas == last.output_text == whole.output_text
    assert last.usage.output_tokens == whole.usage.output_tokens
    assert client.responses.retrieve(last.id).output_text == deltas


def test_the_clients_own_stream_helper(client: openai.OpenAI) -> None:
    with client.responses.stream(model="fake", input="Hi", temperature=0, text=FORM) as stream:
        for _ in stream:
            pass
        response = stream.get_final_response()
    assert response.output_text == create(client, text=FORM, max_output_tokens=200).output_text


def test_a_conversation_goes_on(client: openai.OpenAI) -> None:
    first = create(client)
    second = create(client, input="And?", previous_response_id=first.id)
    by_hand = create(
        client,
        input=[
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": first.output_text},
            {"role": "user", "content": [{"type": "input_text", "text": "And?"}]},
        ],
    )
    assert second.output_text == by_hand.output_text
    assert second.previous_response_id == first.id
    third = create(client, input="So?", previous_response_id=second.id, instructions="Be short.")
    assert third.usage.input_tokens > second.usage.input_tokens
    items = [*first.output, {"role": "user", "content": "And?"}]
    again = create(client, input=[{"role": "user", "content": "Hi"}, *[_plain(item) for item in items]])
    assert again.output_text == second.output_text


def _plain(item: Any) -> Any:
    return item if isinstance(item, dict) else item.model_dump(exclude_none=True)


def test_a_function_is_called_and_answered(client: openai.OpenAI) -> None:
    choice: Any = {"type": "function", "name": "w"}
    response = create(client, tools=[TOOL], tool_choice=choice, max_output_tokens=200)
    (call,) = response.output
    assert (call.type, call.name, call.status) == ("function_call", "w", "completed")
    assert json.loads(call.arguments)["unit"] in ("C", "F")
    answer: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "7"}
    later = create(client, previous_response_id=response.id, input=[answer], tools=[TOOL])
    assert later.output_text
    by_hand = create(client, input=[{"role": "user", "content": "Hi"}, _plain(call), answer], tools=[TOOL])
    assert by_hand.output_text == later.output_text

    events = list(create(client, tools=[TOOL], tool_choice=choice, max_output_tokens=200, stream=True))
    kinds = [event.type for event in events]
    assert "response.output_item.added" in kinds
    assert "response.output_text.delta" not in kinds
    deltas = "".join(event.delta for event in events if event.type == "response.function_call_arguments.delta")
    (done,) = (event for event in events if event.type == "response.function_call_arguments.done")
    assert deltas == done.arguments == call.arguments == events[-1].response.output[0].arguments
    assert {event.item_id for event in events if hasattr(event, "item_id")} == {events[-1].response.output[0].id}


def test_logprobs(client: openai.OpenAI) -> None:
    """They are a chat's, whole and streamed; of a call there are none."""
    chat: Any = client.chat.completions.create(
        model="fake",
        messages=[{"role": "user", "content": "Hi"}],
        temperature=0,
        max_completion_tokens=12,
        logprobs=True,
        top_logprobs=2,
    )
    expected = [
        (entry.token, entry.logprob, [top.token for top in entry.top_logprobs])
        for entry in chat.choices[0].logprobs.content
    ]
    assert len(expected) == 12

    def told(entries: Any) -> list[Any]:
        return [(entry.token, entry.logprob, [top.token for top in entry.top_logprobs]) for entry in entries]

    asked = {"include": LOGPROBS, "top_logprobs": 2}
    response = create(client, **asked)
    assert response.output_text == chat.choices[0].message.content
    assert told(response.output[0].content[0].logprobs) == expected
    events = list(create(client, stream=True, **asked))
    pieces = [entry for event in events if event.type == "response.output_text.delta" for entry in event.logprobs]
    assert told(pieces) == expected
    (ended,) = [event for event in events if event.type == "response.output_text.done"]
    assert told(ended.logprobs) == expected
    assert create(client).output[0].content[0].logprobs == []
    called = create(
        client, tools=[TOOL], tool_choice="required", parallel_tool_calls=False, max_output_tokens=200, **asked
    )
    assert [item.type for item in called.output] == ["function_call"]


def test_a_form(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    form: Any = {"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}}
    response = create(client, text=form, max_output_tokens=200)
    assert set(json.loads(response.output_text)) == {"a"}
    assert response.text.format.type == "json_schema"


def test_kept_found_and_deleted(client: openai.OpenAI) -> None:
    response = create(client)
    assert client.responses.retrieve(response.id).output_text == response.output_text
    client.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError, match="there is no response"):
        client.responses.retrieve(response.id)
    with pytest.raises(openai.BadRequestError, match="there is no response") as gone:
        create(client, previous_response_id=response.id)
    assert gone.value.param == "previous_response_id"
    unkept = create(client, store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(unkept.id)


def test_of_another_key_it_is_not_found() -> None:
    store = ResponseStore()
    store.add("anna", {"id": "resp_1"}, [])
    assert store.get("resp_1", "eva") is None
    assert not store.remove("resp_1", "eva")
    assert store.get("resp_1", "anna") is not None
    for number in range(MOST + 1):
        store.add("eva", {"id": f"resp_{number + 2}"}, [])
    assert store.get("resp_1", "anna") is None


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input": []}, "input"),
        ({"input": 3}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "wizard", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"input": [{"type": "function_call_output", "call_id": "x", "output": "y"}]}, "input"),
        ({"background": True}, "background"),
        ({"conversation": "c"}, "conversation"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"truncation": "auto"}, "truncation"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"include": [*LOGPROBS, "reasoning.encrypted_content"]}, "include"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"include": LOGPROBS, "top_logprobs": 21}, "top_logprobs"),
        ({"temperature": 3}, "temperature"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 10_000}, "max_output_tokens"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0]"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "other"}, "tools": [TOOL]}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.name"),
        ({"text": {"format": {"type": "xml"}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "strin"}}}}, "text.format"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options"),
        ({"mood": "good"}, "mood"),
    ],
)
def test_refused_by_name(url: str, change: dict[str, Any], param: str) -> None:
    response = httpx.post(f"{url}/v1/responses", json={"model": "fake", "input": "Hi"} | change)
    assert response.status_code == 400, response.text
    assert error_of(response)["param"] == param
