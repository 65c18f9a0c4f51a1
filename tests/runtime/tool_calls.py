"""Tools, and their calls as families write and read them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from edge_runtime.tools.formats import GLM, GRANITE, HERMES, LLAMA, MISTRAL, PHI, PLAIN, CallFormat
from edge_runtime.tools.pieces import add_call, whole
from edge_runtime.tools.reader import CallReader

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
