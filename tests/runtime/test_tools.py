"""Calls of tools: what requests may say, how families write calls, and finding calls as they come."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime.errors import InvalidRequest
from edge_runtime.template import ChatTemplate
from edge_runtime.tools.formats import GLM, GRANITE, HERMES, LLAMA, MISTRAL, PHI, PLAIN, CallFormat, call_format
from edge_runtime.tools.prompting import for_template
from edge_runtime.tools.reader import CallReader
from edge_runtime.tools.wish import ToolWish
from tests.runtime.tool_calls import CITY, FORMATS, NAMES, TOOLS, read, written

FAMILIES = Path(__file__).parents[1] / "fixtures" / "families"


def cuts(text: str) -> list[list[str]]:
    """Whole, by character, and by pieces of random length."""
    rng = np.random.default_rng(len(text))
    ways = [[text], list(text)]
    for _ in range(20):
        places = sorted(rng.integers(0, len(text) + 1, 6).tolist())
        ways.append([text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)])
    return ways


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize("blank", ["", "\n"])
def test_calls_are_found_however_they_come(form: CallFormat, blank: str) -> None:
    calls = [("get_weather", CITY)]
    if not form.at_start:
        calls.append(("get_time", {}))
    text = written(form, calls, blank)
    for before in ("", "\n\n", *([] if form.at_start else ["Let me see. "])):
        for pieces in cuts(before + text):
            content, found, reader = read(form, pieces)
            assert content == before.lstrip("\n"), pieces
            assert [(each["function"]["name"], json.loads(each["function"]["arguments"])) for each in found] == calls
            assert len({each["id"] for each in found}) == len(calls)
            assert reader.called


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_arguments_come_before_they_are_whole(form: CallFormat) -> None:
    reader = CallReader(form, NAMES)
    text = written(form, [("get_weather", CITY)])
    _, pieces = reader.add(text[: text.index("Bern")])
    assert pieces[0]["function"] == {"name": "get_weather", "arguments": ""}
    assert json.dumps(CITY).startswith("".join(each["function"]["arguments"] for each in pieces))
    assert pieces[-1]["function"]["arguments"].endswith('"')


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize(
    "text",
    [
        *("", "Hello.", "a < b, [1, 2] and {", "get_weather is what I would call", '{"answer": 3}', "<tool", "[TOOL_C"),
        *("<tool_call>", "<tool_call> none", '[TOOL_CALLS] [{"name', "<|tool_call|>", '{"name": 3}', "get_time\nnone"),
        '<tool_call>{"nam": "x"}</tool_call> or so',
    ],
)
def test_other_text_stays_as_it_is(form: CallFormat, text: str) -> None:
    if form.bare_name and text.startswith("get_time\n"):
        return  # which is a call there
    for pieces in cuts(text) if text else [[""]]:
        content, found, reader = read(form, pieces)
        assert (content, found, reader.called) == (text, [], False)


def test_text_after_a_call_is_content() -> None:
    text = written(HERMES, [("get_time", {})]) + "\n\nDone. <b>"
    for pieces in cuts(text):
        content, found, _ = read(HERMES, pieces)
        assert (content, len(found)) == ("\n\nDone. <b>", 1)


def test_a_call_that_is_cut_off_has_what_came() -> None:
    text = written(HERMES, [("get_weather", CITY)])
    content, found, _ = read(HERMES, [text[: text.index("Bern")]])
    assert content == ""
    assert found[0]["function"]["name"] == "get_weather"
    assert json.dumps(CITY).startswith(found[0]["function"]["arguments"])


def test_ids_are_as_templates_take_them() -> None:
    _, (call,), _ = read(MISTRAL, [written(MISTRAL, [("get_time", {})])])
    assert call["id"].isalnum()
    assert len(call["id"]) == 9
    _, (call,), _ = read(HERMES, [written(HERMES, [("get_time", {})])])
    assert call["id"].startswith("call_")


# --- wishes and prompts -----------------------------------------------------------------------------------------------


def test_wishes() -> None:
    assert ToolWish.of({}) is None
    assert ToolWish.of({"tools": []}) is None
    assert ToolWish.of({"tools": TOOLS, "tool_choice": "none"}) is None
    free = ToolWish.of({"tools": TOOLS})
    assert free is not None
    assert (free.forced, free.parallel, len(free.functions)) == (False, True, 2)
    named = ToolWish.of({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "get_time"}}})
    assert named is not None
    assert (named.forced, named.parallel, [each.name for each in named.functions]) == (True, False, ["get_time"])


def test_a_schema_that_is_too_long() -> None:
    function = {"name": "f", "parameters": {"x": "y" * 2**18}}
    with pytest.raises(InvalidRequest, match="the limit is 262,144") as refused:
        ToolWish.of({"tools": [{"type": "function", "function": function}]})
    assert refused.value.param == "tools[0].function.parameters"


@pytest.mark.parametrize("folder", sorted(FAMILIES.iterdir()), ids=lambda folder: folder.name)
def test_formats_of_the_families(folder: Path) -> None:
    """None of these small fixtures has a template that speaks of tools."""
    template = folder / "chat_template.jinja"
    assert call_format(template.read_text() if template.exists() else None) in (PLAIN, *FORMATS)


@pytest.mark.parametrize(
    ("source", "form"),
    [
        ('{% if tools %}<tool_call>\n{"name": , "arguments": }{% endif %}', HERMES),
        ('{% if tools %}<|start_header_id|>{"name": , "parameters": }{% endif %}', LLAMA),
        ("{% if tools %}[AVAILABLE_TOOLS][TOOL_CALLS]{% endif %}", MISTRAL),
        ("{% if tools %}<|tool|><|/tool_call|><|tool_call|>{% endif %}", PHI),
        ("{% if tools %}<|tool_call|>{% endif %}", GRANITE),
        ("[gMASK]<sop>{% if tools %}{% endif %}", GLM),
        ("{% if tools %}<tool_call><function=f><parameter=p>{% endif %}", PLAIN),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", PLAIN),
        (None, PLAIN),
    ],
)
def test_formats_by_their_templates(source: str | None, form: CallFormat) -> None:
    assert call_format(source) is form


TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Bern"}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "1", "content": "rain"},
]


def test_arguments_without_end_stay_text() -> None:
    deep = "[" * 100_000
    call = {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": deep}}
    messages, _ = for_template([TALK[0], TALK[1] | {"tool_calls": [call]}], None, HERMES)
    assert messages[1]["tool_calls"][0]["function"]["arguments"] == deep


def test_a_template_that_knows_tools_gets_them() -> None:
    source = (
        "{% for t in tools or [] %}[{{ t.function.name }}:{{ t.function.parameters | tojson }}]{% endfor %}"
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}"
        "{% endfor %}"
    )
    messages, tools = for_template(TALK, ToolWish.of({"tools": TOOLS}), HERMES)
    text = ChatTemplate(source).render(messages, tools=tools)
    assert '[get_time:{"type": "object", "properties": {}}]' in text
    assert text.endswith('<user>weather?<assistant>get_weather({"city": "Bern"})<tool>rain')


def test_other_templates_are_told_in_words() -> None:
    messages, tools = for_template(TALK, ToolWish.of({"tools": TOOLS}), PLAIN)
    assert tools is None
    system, user, assistant, result = messages
    assert system["role"] == "system"
    assert '"name": "get_weather"' in system["content"]
    assert user == TALK[0]
    content, calls, _ = read(PLAIN, [assistant["content"]])
    assert (content, calls[0]["function"]["name"]) == ("", "get_weather")
    assert result == {"role": "user", "content": "<tool_response>\nrain\n</tool_response>"}
    with_system, _ = for_template([{"role": "system", "content": "Be kind."}], ToolWish.of({"tools": TOOLS}), PLAIN)
    assert len(with_system) == 1
    assert with_system[0]["content"].startswith("Be kind.\n\nYou can call functions.")
    assert for_template(TALK[:1], None, PLAIN) == (TALK[:1], None)
