"""Calls of tools: what requests may say, how families write calls, the grammar, and finding calls as they come."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jsonschema import Draft202012Validator

from edge_runtime.constraints import Grammars
from edge_runtime.errors import InvalidRequest
from edge_runtime.grammar import Grammar
from edge_runtime.template import ChatTemplate
from edge_runtime.tokenizer import Tokenizer
from edge_runtime.tools.call_grammar import call_grammar
from edge_runtime.tools.formats import GLM, GRANITE, HERMES, LLAMA, MISTRAL, PHI, PLAIN, CallFormat, call_format
from edge_runtime.tools.pieces import add_call, whole
from edge_runtime.tools.prompting import for_template
from edge_runtime.tools.reader import CallReader
from edge_runtime.tools.wish import ToolWish
from tests.server.served import byte_tokenizer

FAMILIES = Path(__file__).parents[1] / "fixtures" / "families"
FORMATS = [HERMES, LLAMA, MISTRAL, PHI, GRANITE, GLM, PLAIN]
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1, "maximum": 14}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "get_weather", "description": "of a city", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "get_time"}},
]
NAMES = ["get_weather", "get_time"]
CITY = {"city": 'Bern {"[,]}\\ and "Köln"', "days": 3}


def written(form: CallFormat, calls: Sequence[tuple[str, Any]], blank: str = "") -> str:
    """As a model of that family would write them."""
    if form.bare_name:
        ((name, arguments),) = calls
        return f"{name}\n{json.dumps(arguments)}"
    each = [json.dumps({"name": name, form.arguments: arguments}) for name, arguments in calls]
    if form.listed:
        return f"{form.opening}{blank}[{', '.join(each)}]{blank}{form.closing}"
    if form.at_start:
        return each[0]
    return "\n".join(f"{form.opening}{blank}{call}{blank}{form.closing}" for call in each)


def read(form: CallFormat, pieces: Sequence[str]) -> tuple[str, list[dict[str, Any]], CallReader]:
    reader = CallReader(form, NAMES)
    content, calls = "", []
    for piece in pieces:
        text, found = reader.add(piece)
        content += text
        for each in found:
            add_call(calls, each)
    text, found = reader.flush()
    for each in found:
        add_call(calls, each)
    return content + text, whole(calls), reader


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


# --- the grammar ------------------------------------------------------------------------------------------------------


def special_tokenizer(*markers: str) -> Tokenizer:
    import tokenizers

    inner = tokenizers.Tokenizer.from_str(byte_tokenizer().json)
    inner.add_special_tokens(list(markers))
    return Tokenizer(inner.to_str(), eos_ids=[257])


def special_of(tokenizer: Tokenizer) -> Any:
    def special(text: str) -> int | None:
        token = tokenizer.token_to_id(text)
        return token if token in tokenizer.special_ids else None

    return special


def drawn(tokenizer: Tokenizer, grammar: Grammar, seed: int, begun: str = "", limit: int = 400) -> str:
    """An answer of a model that thinks nothing, held to the grammar; it ends as soon as it may, after 60 tokens."""
    constraint = Grammars(tokenizer).constraint(grammar)
    rng = np.random.default_rng(seed)
    tokens = tokenizer.encode(begun, parse_special=True)
    while len(tokens) < limit:
        logits = constraint.only(rng.normal(size=tokenizer.vocab_size).astype(np.float32), tokens, 0)
        if np.isfinite(logits[257]) and (len(tokens) > 60 or np.isfinite(logits).sum() == 1):
            return tokenizer.decode(tokens, False)
        logits = logits.copy()
        logits[257] = -np.inf
        if np.isfinite(logits[ord('"')]) and len(tokens) > 60:
            logits[tokenizer.encode('"')[0]] += 20  # strings come to an end
        tokens.append(int(logits.argmax()))
    raise AssertionError("it does not end")


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize("special", [False, True])
def test_forced_calls_are_valid_whatever_the_model_thinks(form: CallFormat, special: bool) -> None:
    markers = [text for text in (form.opening, form.closing) if text and not form.at_start] if special else []
    tokenizer = special_tokenizer(*markers)
    wish = ToolWish.of({"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False})
    assert wish is not None
    grammar = call_grammar(form, wish, special_of(tokenizer))
    seen = set()
    for seed in range(6):
        text = drawn(tokenizer, grammar, seed)
        content, calls, _ = read(form, [text])
        assert content == ""
        (call,) = calls
        seen.add(call["function"]["name"])
        arguments = json.loads(call["function"]["arguments"])
        if call["function"]["name"] == "get_weather":
            Draft202012Validator(WEATHER).validate(arguments)
        else:
            assert arguments == {}
    assert seen <= set(NAMES)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_the_grammar_takes_what_models_write(form: CallFormat) -> None:
    tokenizer = byte_tokenizer()
    wish = ToolWish.of({"tools": TOOLS})
    assert wish is not None
    grammar = call_grammar(form, ToolWish(wish.functions, forced=True), special_of(tokenizer))
    several = [("get_weather", {"city": "Bern", "days": 3})] + ([] if form.at_start else [("get_time", {})])
    for blank in ("", "\n"):
        ids = tokenizer.encode(written(form, several, blank))
        constraint = Grammars(tokenizer).constraint(grammar)
        zeros = np.zeros(tokenizer.vocab_size, np.float32)
        for count, token in enumerate(ids):
            assert np.isfinite(constraint.only(zeros, ids[:count], 0)[token]), tokenizer.decode(ids[: count + 1])
        assert np.isfinite(constraint.only(zeros, ids, 0)[257])


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize("special", [False, True])
def test_free_text_is_free_until_a_call_begins(form: CallFormat, special: bool) -> None:
    markers = [form.opening] if special and form.opening and not form.at_start else []
    tokenizer = special_tokenizer(*markers)
    wish = ToolWish.of({"tools": TOOLS})
    assert wish is not None
    grammar = call_grammar(form, wish, special_of(tokenizer))
    constraint = Grammars(tokenizer).constraint(grammar)
    logits = np.zeros(tokenizer.vocab_size, np.float32)
    before = "" if form.at_start else "Let me see: <t> [T "
    opening = form.openings(NAMES)[0]
    ids = tokenizer.encode(before + opening, parse_special=True)
    for count in range(len(tokenizer.encode(before))):
        assert constraint.only(logits, ids[:count], 0) is logits
    held = constraint.only(logits, ids, 0)
    assert 0 < np.isfinite(held).sum() < 20
    if form.at_start:
        free = tokenizer.encode("Hello " + opening)
        constraint = Grammars(tokenizer).constraint(grammar)
        assert constraint.only(logits, free, 0) is logits


def test_a_call_or_an_answer_of_a_form() -> None:
    tokenizer = byte_tokenizer()
    wish = ToolWish.of({"tools": TOOLS})
    assert wish is not None
    answer = Grammar.json_schema({"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]})
    grammar = call_grammar(HERMES, wish, special_of(tokenizer), answer)
    firsts = Grammars(tokenizer).constraint(grammar).only(np.zeros(tokenizer.vocab_size, np.float32), [], 0)
    assert {tokenizer.decode([int(token)]) for token in np.flatnonzero(np.isfinite(firsts))} == {"<", "{"}
    with pytest.raises(InvalidRequest, match="not of a regex"):
        call_grammar(HERMES, wish, special_of(tokenizer), Grammar.regex("a+"))


def test_unknown_words_of_a_schema_are_passed_over_unless_it_is_strict() -> None:
    tokenizer = byte_tokenizer()
    for strict in (False, True):
        parameters = {"type": "object", "properties": {"a": {"type": "integer", "not": {"const": 3}}}}
        tools = [{"type": "function", "function": {"name": "f", "parameters": parameters, "strict": strict}}]
        wish = ToolWish.of({"tools": tools})
        assert wish is not None
        refusal = Grammars(tokenizer).refusal(call_grammar(HERMES, wish, special_of(tokenizer)))
        assert (refusal is not None) == strict


def test_arguments_that_are_not_listed_are_not_made_up() -> None:
    inner = {"type": "object", "properties": {"b": {"type": "boolean"}}, "required": ["b"]}
    parameters = {
        "type": "object",
        "properties": {"a": inner, "l": {"type": "array", "items": inner}},
        "required": ["a"],
    }
    tokenizer = byte_tokenizer()
    wish = ToolWish.of({"tools": [{"type": "function", "function": {"name": "f", "parameters": parameters}}]})
    assert wish is not None
    grammar = call_grammar(HERMES, ToolWish(wish.functions, forced=True), special_of(tokenizer))
    zeros = np.zeros(tokenizer.vocab_size, np.float32)
    for text, fits in (
        ('{"a": {"b": true}}', True),
        ('{"a": {"b": true}, "l": [{"b": false}]}', True),
        ('{"a": {"b": true}, "c": 3}', False),
        ('{"a": {"b": true, "c": 3}}', False),
        ('{"a": {"b": true}, "l": [{"c": 3}]}', False),
    ):
        ids = tokenizer.encode(f'<tool_call>{{"name": "f", "arguments": {text}}}</tool_call>')
        constraint = Grammars(tokenizer).constraint(grammar)
        places = range(len(ids))
        assert all(np.isfinite(constraint.only(zeros, ids[:n], 0)[ids[n]]) for n in places) == fits, text


def test_definitions_are_found() -> None:
    parameters = {
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/A"}},
        "required": ["a"],
        "additionalProperties": False,
        "$defs": {"A": {"enum": ["x"]}},
    }
    tokenizer = byte_tokenizer()
    for form in FORMATS:
        fields = {"tools": [{"type": "function", "function": {"name": "f", "parameters": parameters}}]}
        wish = ToolWish.of({**fields, "tool_choice": "required"})
        assert wish is not None
        text = drawn(tokenizer, call_grammar(form, wish, special_of(tokenizer)), 0)
        assert '"x"' in text


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
