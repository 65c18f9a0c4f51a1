"""Messages of a chat."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from edge_runtime.errors import InvalidRequest
from edge_runtime.server.wire.parse import asks_nothing, unsupported

ROLES = ("system", "developer", "user", "assistant", "tool")


class TextPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: str
    text: str | UnsetType = UNSET
    image_url: Any = UNSET
    input_audio: Any = UNSET
    file: Any = UNSET
    refusal: Any = UNSET


class FunctionCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    arguments: str = "{}"
    """JSON, as the model wrote it."""


class ToolCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    id: str
    function: FunctionCall
    type: str = "function"
    index: int | None = None
    """Of clients that send the pieces of a stream back."""

    def plain(self) -> dict[str, Any]:
        return {"id": self.id, "type": self.type, "function": msgspec.to_builtins(self.function)}


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    role: str
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    # What clients send back from an earlier answer, all null there.
    refusal: Any = None
    annotations: Any = None
    audio: Any = None
    function_call: Any = None

    def plain(self) -> dict[str, Any]:
        """As chat templates take it."""
        content: Any = self.content
        if isinstance(content, list):
            content = [{"type": "text", "text": part.text} for part in content]
        more: dict[str, Any] = {
            name: value for name in ("name", "tool_call_id") if (value := getattr(self, name)) is not None
        }
        if self.tool_calls:
            more["tool_calls"] = [call.plain() for call in self.tool_calls]
        return {"role": "system" if self.role == "developer" else self.role, "content": content} | more


def check_messages(messages: list[Message]) -> None:
    """InvalidRequest for what the types do not say, and for answers of tools that nobody has called."""
    if not messages:
        raise InvalidRequest("messages must hold at least one message", "messages")
    called: set[str] = set()
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        _check(message, where)
        if message.role == "tool" and message.tool_call_id not in called:
            raise InvalidRequest(
                f"{where} answers the call {message.tool_call_id!r}, which no message before it has",
                f"{where}.tool_call_id",
            )
        called |= {call.id for call in message.tool_calls or ()}


def _check(message: Message, where: str) -> None:
    if message.role not in ROLES:
        raise InvalidRequest(
            f"{where}.role must be one of {', '.join(ROLES)}, not {message.role[:100]!r}", f"{where}.role"
        )
    for name in ("refusal", "annotations", "audio", "function_call"):
        if not asks_nothing(name, getattr(message, name)):
            raise unsupported(f"{where}.{name}")
    if message.tool_calls and message.role != "assistant":
        raise InvalidRequest(f"{where}.tool_calls: only the assistant calls tools", f"{where}.tool_calls")
    for number, call in enumerate(message.tool_calls or ()):
        if call.type != "function":
            place = f"{where}.tool_calls[{number}].type"
            raise InvalidRequest(f"{place} must be function, not {call.type[:100]!r}", place)
    if message.role == "tool" and message.tool_call_id is None:
        raise InvalidRequest(f"{where}.tool_call_id is missing", f"{where}.tool_call_id")
    if message.role != "tool" and message.tool_call_id is not None:
        raise InvalidRequest(f"{where}.tool_call_id is for messages of tools", f"{where}.tool_call_id")
    if message.content is None:
        if message.tool_calls:
            return
        raise InvalidRequest(f"{where}.content is missing", f"{where}.content")
    if isinstance(message.content, str):
        return
    for index, part in enumerate(message.content):
        place = f"{where}.content[{index}]"
        if part.type != "text":
            raise InvalidRequest(f"{place} is a part of type {part.type!r}: only text is supported", f"{place}.type")
        if not isinstance(part.text, str):
            raise InvalidRequest(f"{place}.text is missing", f"{place}.text")
