"""What a request says of tools, checked."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from edge_runtime.errors import InvalidRequest
from edge_runtime.grammar import LONGEST

MOST = 128
"""Tools of a request, as OpenAI's API takes."""
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_MODES = ("none", "auto", "required")
FIELDS = ("tools", "tool_choice", "parallel_tool_calls")
"""Of a request that speak of tools."""


class Function(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """JSON schema of an object; None: there are none."""
    strict: bool | None = None
    """Arguments keep every word of the schema, or it is refused; else words that cannot be kept are passed over."""


class Tool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: str
    function: Function


class _Named(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str


class _Choice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: str
    function: _Named


class ToolWish(msgspec.Struct, frozen=True):
    """The tools that an answer may call: none where the request has none, or wants none called."""

    functions: tuple[Function, ...]
    forced: bool = False
    """It must call one."""
    parallel: bool = True
    """It may call several."""

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> ToolWish | None:
        """From a request's :data:`FIELDS`; None where nothing may be called. InvalidRequest, with the field's path."""
        functions = _functions(fields.get("tools"))
        choice = fields.get("tool_choice")
        parallel = fields.get("parallel_tool_calls")
        if not isinstance(parallel, bool | None):
            raise InvalidRequest("parallel_tool_calls must be true or false", "parallel_tool_calls")
        if choice is None or choice in _MODES:
            if choice == "required" and not functions:
                raise InvalidRequest("tool_choice is required, but there are no tools", "tool_choice")
            if choice == "none" or not functions:
                return None
            return cls(functions, choice == "required", parallel is not False)
        named = _named(choice)
        chosen = tuple(each for each in functions if each.name == named)
        if not chosen:
            raise InvalidRequest(f"tool_choice names {named!r}, which is none of the tools", "tool_choice")
        return cls(chosen, forced=True, parallel=False)


def _functions(given: Any) -> tuple[Function, ...]:
    if given is None:
        return ()
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        raise InvalidRequest("tools must be a list", "tools")
    if len(given) > MOST:
        raise InvalidRequest(f"there are {len(given)} tools; the limit is {MOST}", "tools")
    functions = tuple(_function(each, f"tools[{index}]") for index, each in enumerate(given))
    names = [each.name for each in functions]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InvalidRequest(f"two tools are called {twice!r}", "tools")
    return functions


def _function(given: Any, where: str) -> Function:
    try:
        tool = msgspec.convert(given, Tool)
        size = len(json.dumps(tool.function.parameters or {}))
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"{where}: {str(error).replace('`', '')}", where) from error
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"{where}.function.parameters is not JSON: {error}", where) from error
    if tool.type != "function":
        raise InvalidRequest(f"{where}.type must be function, not {tool.type!r}", f"{where}.type")
    function = tool.function
    if not _NAME.fullmatch(function.name):
        raise InvalidRequest(
            f"{where}.function.name must have 1 to 64 letters, digits, _ or -", f"{where}.function.name"
        )
    if size > LONGEST:
        raise InvalidRequest(
            f"{where}.function.parameters has {size:,} characters; the limit is {LONGEST:,}",
            f"{where}.function.parameters",
        )
    if (function.parameters or {}).get("type", "object") != "object":
        raise InvalidRequest(
            f"{where}.function.parameters must be the schema of an object", f"{where}.function.parameters"
        )
    return function


def _named(choice: Any) -> str:
    try:
        wish = msgspec.convert(choice, _Choice)
    except msgspec.ValidationError as error:
        raise InvalidRequest(
            f"tool_choice must be {', '.join(_MODES)} or name a function, not {str(choice)[:100]!r}", "tool_choice"
        ) from error
    if wish.type != "function":
        raise InvalidRequest(f"tool_choice.type must be function, not {wish.type!r}", "tool_choice.type")
    return wish.function.name
