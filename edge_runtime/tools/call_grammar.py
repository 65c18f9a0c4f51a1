"""The form of calls, as a grammar: names that there are, arguments by their schemas."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from edge_runtime.constraints import WHITESPACE
from edge_runtime.errors import InvalidRequest
from edge_runtime.grammar import Grammar
from edge_runtime.tools.formats import CallFormat
from edge_runtime.tools.wish import Function, ToolWish

Special = Callable[[str], int | None]
"""The id of a text that is one special token; None: it is ordinary text."""

_INSIDE = ("items", "prefixItems", "anyOf", "oneOf")
"""Keywords with schemas in them."""
MOST_CALLS = 16
"""Of an answer. Small models would go on and on."""


def call_grammar(form: CallFormat, wish: ToolWish, special: Special, answer: Grammar | None = None) -> Grammar:
    """Of an answer that may call what ``wish`` has; ``answer``: the form that it must have otherwise.

    Where calls are free to be made or not, and any text may come before them, the grammar holds from where they begin.
    InvalidRequest for an ``answer`` that cannot stand beside them.
    """
    rules = list(_rules(form, wish, special))
    if answer is None or wish.forced:
        grammar = replace(Grammar.lark("\n".join(["start: calls", *rules])), field="tools")
        openings = form.openings([each.name for each in wish.functions])
        return grammar if wish.forced else replace(grammar, openings=openings, at_start=form.at_start)
    if not answer.json:
        raise InvalidRequest("tools may be called in place of JSON, not of a regex or Lark grammar", "tools")
    schema = json.loads(answer.text or '{"type": "object"}')
    text = "\n".join(["start: calls | answer", *rules, f"answer: %json {_schema(schema, strict=True)}"])
    return replace(Grammar.lark(text), field="tools")


def _rules(form: CallFormat, wish: ToolWish, special: Special) -> Iterator[str]:
    opening, closing = (_marker(text, special) for text in (form.opening, form.closing))
    yield r"ws: /[ \n\t]{0,8}/"
    for index, function in enumerate(wish.functions):
        yield from _call_rules(form, function, index)
    yield f"call: {' | '.join(f'call{index}' for index in range(len(wish.functions)))}"
    several = wish.parallel
    if form.listed:
        more = f'(ws "," ws call){{0,{MOST_CALLS - 1}}}' if several else ""
        yield f'calls: {opening} ws "[" ws call {more} ws "]" ws {closing}'
    elif form.at_start:
        yield "calls: call"
    else:
        yield f"one: {opening} ws call ws {closing}"
        yield f"calls: one {f'(ws one){{0,{MOST_CALLS - 1}}}' if several else ''}"


def _call_rules(form: CallFormat, function: Function, index: int) -> Iterator[str]:
    schema = _closed(function.parameters or {"type": "object", "properties": {}})
    strict = bool(function.strict)
    name = _quoted(json.dumps(function.name))
    if form.at_start:  # the opening is a part of what is JSON in other formats: put together by hand
        yield f"arguments{index}: %json {_schema(schema, strict)}"
    if form.bare_name:
        yield f'call{index}: {_quoted(function.name)} "\\n" arguments{index}'
    elif form.at_start:
        key = _quoted(json.dumps(form.arguments))
        yield f'call{index}: {_quoted(form.opening)} ws {name} ws "," ws {key} ws ":" ws arguments{index} ws "}}"'
    else:
        call = {
            "type": "object",
            "properties": {"name": {"const": function.name}, form.arguments: schema},
            "required": ["name", form.arguments],
            "additionalProperties": False,
        }
        definitions: dict[str, Any] = {
            key: schema[key] for key in ("$defs", "definitions") if key in schema
        }  # found from the root
        yield f"call{index}: %json {_schema({**call, **definitions}, strict)}"


def _closed(schema: Any) -> Any:
    """Objects have the properties that are listed and no others, where nothing is said of others, as in llama.cpp:
    small models make up arguments if they may."""
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: _closed(value) if key in _INSIDE else value for key, value in schema.items()}
    for key in ("properties", "$defs", "definitions"):
        if isinstance(made.get(key), dict):
            made[key] = {name: _closed(value) for name, value in made[key].items()}
    if "properties" in made and not made.keys() & {"additionalProperties", "allOf", "patternProperties"}:
        made["additionalProperties"] = False
    return made


def _marker(text: str, special: Special) -> str:
    if not text:
        return ""
    token = special(text)
    return _quoted(text) if token is None else f"<[{token}]>"


def _schema(schema: Mapping[str, Any], strict: bool) -> str:
    return json.dumps({**schema, "x-guidance": {"whitespace_pattern": WHITESPACE, "lenient": not strict}})


def _quoted(text: str) -> str:
    """A Lark string."""
    return json.dumps(text, ensure_ascii=False)
