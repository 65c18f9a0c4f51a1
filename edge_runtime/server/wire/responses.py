"""POST /v1/responses: another form of the same wishes as a chat's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import msgspec

from edge_runtime.errors import InvalidRequest
from edge_runtime.grammar import Grammar
from edge_runtime.policy.check import FIELDS as POLICY_FIELDS
from edge_runtime.prompts import About
from edge_runtime.sampling import SamplingParams
from edge_runtime.server.wire.parse import refuse_unsupported
from edge_runtime.server.wire.response_format import JsonSchema, ResponseFormat
from edge_runtime.server.wire.sampling import about_of
from edge_runtime.tools.wish import ToolWish

_HARMLESS: Mapping[str, tuple[object, ...]] = {
    "background": (None, False),
    "conversation": (None,),
    "max_tool_calls": (None,),
    "prompt": (None,),
    "reasoning": (None, {}, {"effort": None, "summary": None}),
    "truncation": (None, "disabled"),
    "service_tier": (None, "auto", "default"),
}
"""Fields that are not supported → the values that ask for nothing."""
_LOGPROBS = "message.output_text.logprobs"
_TEXT_PARTS = ("input_text", "output_text", "text")


class TextFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: str = "text"
    name: str | None = None
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None
    syntax: str | None = None
    definition: str | None = None


class TextWish(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: TextFormat | None = None
    verbosity: Any = None


class ResponsesStreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    include_obfuscation: bool = False


class ResponsesRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    model: str
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: ResponsesStreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_output_tokens: int | None = None
    text: TextWish | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Any = None
    background: Any = None
    conversation: Any = None
    include: list[str] | None = None
    max_tool_calls: Any = None
    prompt: Any = None
    reasoning: Any = None
    top_logprobs: int | None = None
    truncation: Any = None
    service_tier: Any = None

    def check(self) -> None:
        """InvalidRequest for what the types do not say."""
        refuse_unsupported(self, harmless=_HARMLESS)
        if self.temperature is not None and not 0 <= self.temperature <= 2:
            raise InvalidRequest(f"temperature must be from 0 to 2, not {self.temperature:g}", "temperature")
        for each in self.include or ():
            if each != _LOGPROBS:
                raise InvalidRequest(
                    f"include: {each[:100]!r} is not supported by this server: leave it out", "include"
                )
        if self.top_logprobs and not self.include:
            raise InvalidRequest(f"top_logprobs needs include to hold {_LOGPROBS}", "top_logprobs")
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options needs stream to be true", "stream_options")
        if self.text is not None and self.text.verbosity is not None:
            raise InvalidRequest("text.verbosity is not supported by this server: leave it out", "text.verbosity")
        ToolWish.of(self.tool_fields())

    @property
    def kept(self) -> bool:
        """Whether the response can be referred to later."""
        return self.store is not False

    def messages(self) -> list[dict[str, Any]]:
        """What is new in the conversation, as chat templates take it. InvalidRequest names the item."""
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        if not self.input:
            raise InvalidRequest("input must hold at least one item", "input")
        return list(_joined(_message(item, f"input[{index}]") for index, item in enumerate(self.input)))

    def params(self) -> SamplingParams:
        try:
            return SamplingParams(
                temperature=self.temperature,
                top_p=self.top_p,
                max_tokens=self.max_output_tokens,
                logprobs=(self.top_logprobs or 0) if self.include else None,
                grammar=self._grammar(),
            )
        except InvalidRequest as error:
            name = {"max_tokens": "max_output_tokens", "logprobs": "top_logprobs"}.get(error.param or "")
            if name is None:
                raise
            raise InvalidRequest(str(error).replace(error.param or "", name, 1), name) from error

    def about(self, headers: Mapping[str, str]) -> About:
        """What routing may go by."""
        fields = {name: value for name in POLICY_FIELDS if isinstance(value := getattr(self, name, None), str)}
        tools = self.tool_fields()
        return about_of(headers, self.metadata, fields, tools if tools.get("tools") else {})

    def tool_fields(self) -> dict[str, Any]:
        """As a chat has them. InvalidRequest, with the field's path."""
        fields: dict[str, Any] = {}
        if self.tools is not None:
            fields["tools"] = [_tool(each, f"tools[{index}]") for index, each in enumerate(self.tools)]
        choice = self.tool_choice
        if isinstance(choice, dict) and choice.get("type") == "function" and set(choice) == {"type", "name"}:
            choice = {"type": "function", "function": {"name": choice["name"]}}
        if choice is not None:
            fields["tool_choice"] = choice
        if self.parallel_tool_calls is not None:
            fields["parallel_tool_calls"] = self.parallel_tool_calls
        return fields

    def _grammar(self) -> Grammar | None:
        form = None if self.text is None else self.text.format
        if form is None:
            return None
        schema = None
        if form.type == "json_schema":
            if form.name is None:
                raise InvalidRequest("text.format.name is missing", "text.format.name")
            schema = JsonSchema(form.name, form.schema, form.description, form.strict)
        try:
            return ResponseFormat(form.type, schema, form.syntax, form.definition).grammar()
        except InvalidRequest as error:
            text = (
                str(error)
                .replace("response_format.json_schema", "text.format")
                .replace("response_format", "text.format")
            )
            raise InvalidRequest(text, "text.format") from error


# --- items ------------------------------------------------------------------------------------------------------------


class _Part(msgspec.Struct, frozen=True):
    type: str
    text: str = ""


class _MessageItem(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    role: str
    content: str | list[_Part]
    type: str = "message"
    id: str | None = None
    status: str | None = None
    phase: Any = None


class _CallItem(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: str
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: str | None = None


class _OutputItem(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: str
    call_id: str
    output: str | list[_Part]
    id: str | None = None
    status: str | None = None


class _FunctionTool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: str
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


Item = TypeVar("Item")


def _message(item: dict[str, Any], where: str) -> dict[str, Any]:
    kind = item.get("type", "message")
    if kind == "message":
        message = _convert(item, _MessageItem, where)
        if message.role not in ("user", "assistant", "system", "developer"):
            place = f"{where}.role"
            raise InvalidRequest(f"{place} must be user, assistant, system or developer, not {message.role!r}", place)
        role = "system" if message.role == "developer" else message.role
        return {"role": role, "content": _text(message.content, f"{where}.content")}
    if kind == "function_call":
        call = _convert(item, _CallItem, where)
        function = {"name": call.name, "arguments": call.arguments}
        return {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": call.call_id, "type": "function", "function": function}],
        }
    if kind == "function_call_output":
        output = _convert(item, _OutputItem, where)
        return {"role": "tool", "tool_call_id": output.call_id, "content": _text(output.output, f"{where}.output")}
    raise InvalidRequest(
        f"{where}.type must be message, function_call or function_call_output, not {str(kind)[:100]!r}", f"{where}.type"
    )


def _joined(messages: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Calls that come one after the other, or behind words of the assistant, are one message."""
    last: dict[str, Any] | None = None
    for message in messages:
        if last is not None and last["role"] == message["role"] == "assistant" and "tool_calls" in message:
            last = {**last, "tool_calls": [*last.get("tool_calls", ()), *message["tool_calls"]]}
            continue
        if last is not None:
            yield last
        last = message
    if last is not None:
        yield last


def check_calls(messages: list[dict[str, Any]]) -> None:
    """InvalidRequest where a tool answers what nobody has called; with those of earlier responses before them."""
    called: set[str] = set()
    for message in messages:
        called |= {call["id"] for call in message.get("tool_calls", ())}
        if message["role"] == "tool" and message["tool_call_id"] not in called:
            raise InvalidRequest(f"there is no function call {message['tool_call_id'][:100]!r} to answer", "input")


def _text(content: str | list[_Part], where: str) -> str:
    if isinstance(content, str):
        return content
    for index, part in enumerate(content):
        if part.type not in _TEXT_PARTS:
            place = f"{where}[{index}]"
            raise InvalidRequest(
                f"{place} is a part of type {part.type[:100]!r}: only text is supported", f"{place}.type"
            )
    return "\n".join(part.text for part in content)


def _tool(given: dict[str, Any], where: str) -> dict[str, Any]:
    kind = given.get("type")
    if kind != "function":
        raise InvalidRequest(f"{where}.type must be function, not {str(kind)[:100]!r}", f"{where}.type")
    tool = _convert(given, _FunctionTool, where)
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.parameters,
        "strict": tool.strict,
    }
    return {"type": "function", "function": {name: value for name, value in function.items() if value is not None}}


def _convert(given: dict[str, Any], kind: type[Item], where: str) -> Item:
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"{where}: {str(error).replace('`', '')}", where) from error
