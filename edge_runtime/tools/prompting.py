"""Telling a model of its tools, and of what it called before."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from edge_runtime.tools.formats import CallFormat
from edge_runtime.tools.wish import Function, ToolWish

Message = dict[str, Any]


def for_template(
    messages: Sequence[Mapping[str, Any]], wish: ToolWish | None, form: CallFormat
) -> tuple[list[Message], list[dict[str, Any]] | None]:
    """(messages, tools) as the chat template takes them. Where it knows nothing of tools there are none, and the
    messages say it all."""
    if form.native:
        return [_native(message) for message in messages], None if wish is None else _described(wish.functions)
    plain = [_plain(message, form) for message in messages]
    return plain if wish is None else _with_tools(plain, wish, form), None


def _described(functions: Sequence[Function]) -> list[dict[str, Any]]:
    """As Transformers' templates expect them."""
    return [
        {
            "type": "function",
            "function": {
                "name": each.name,
                "description": each.description or "",
                "parameters": each.parameters or {"type": "object", "properties": {}},
            },
        }
        for each in functions
    ]


def _native(message: Mapping[str, Any]) -> Message:
    """With arguments as objects, which templates write as JSON by themselves."""
    made = dict(message)
    if made.get("content") is None:
        made["content"] = ""
    if made.get("tool_calls"):
        made["tool_calls"] = [_native_call(call) for call in made["tool_calls"]]
    return made


def _native_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call["function"])
    function["arguments"] = _object(function.get("arguments"))
    return {**call, "function": function}


def _object(arguments: Any) -> Any:
    """``arguments`` as they were meant, or as they stand if they are not JSON."""
    try:
        return msgspec.json.decode(arguments) if arguments else {}
    except (msgspec.DecodeError, RecursionError):
        return arguments


def _plain(message: Mapping[str, Any], form: CallFormat) -> Message:
    content = message.get("content") or ""
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{_text(content)}\n</tool_response>"}
    calls = message.get("tool_calls")
    if not calls:
        return {"role": message["role"], "content": content}
    written = [f"{form.opening}\n{json.dumps(each)}\n{form.closing}" for each in _calls(calls)]
    return {"role": message["role"], "content": "\n".join([*filter(None, [_text(content)]), *written])}


def _calls(calls: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for call in calls:
        yield {"name": call["function"]["name"], "arguments": _object(call["function"].get("arguments"))}


def _text(content: Any) -> str:
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def _with_tools(messages: list[Message], wish: ToolWish, form: CallFormat) -> list[Message]:
    listed = "\n".join(json.dumps(each) for each in _described(wish.functions))
    several = "one or several of them" if wish.parallel else "one of them"
    told = (
        f"You can call functions. They are, each as JSON:\n<tools>\n{listed}\n</tools>\n\n"
        f"To call {several}, answer with the name and the arguments as JSON, like this, and nothing else:\n"
        f'{form.opening}\n{{"name": "function_name", "arguments": {{"argument": "value"}}}}\n{form.closing}\n'
        "Their results come in <tool_response></tool_response>. If none of them helps, answer in words."
    )
    if messages[0]["role"] == "system":
        first = {**messages[0], "content": f"{_text(messages[0]['content'])}\n\n{told}".lstrip()}
        return [first, *messages[1:]]
    return [{"role": "system", "content": told}, *messages]
