"""The grammar of calls: forced ones are valid whatever the model thinks, and free text is free."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from jsonschema import Draft202012Validator

from edge_runtime.constraints import Grammars
from edge_runtime.errors import InvalidRequest
from edge_runtime.grammar import Grammar
from edge_runtime.tokenizer import Tokenizer
from edge_runtime.tools.call_grammar import call_grammar
from edge_runtime.tools.formats import HERMES, CallFormat
from edge_runtime.tools.wish import ToolWish
from tests.runtime.tool_calls import FORMATS, NAMES, TOOLS, WEATHER, read, written
from tests.server.served import byte_tokenizer


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
