"""Requests and answers as the queue keeps them: JSON."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import msgspec

from edge_runtime.errors import (
    DeviceError,
    EdgeError,
    EngineStopped,
    InvalidRequest,
    LedgerError,
    Overloaded,
    PromptTooLong,
    TierError,
    TierRefused,
)
from edge_runtime.prompts import About, Messages, TierRequest
from edge_runtime.request import Chunk, Usage
from edge_runtime.sampling import SamplingParams


class Choice(msgspec.Struct):
    """One completion."""

    text: str = ""
    finish_reason: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class Done(msgspec.Struct, frozen=True):
    """A whole answer."""

    choices: list[Choice]
    prompt_tokens: int
    completion_tokens: int
    tier: str
    headers: dict[str, str]

    @property
    def usage(self) -> Usage:
        return Usage(self.prompt_tokens, self.completion_tokens)


class Failed(msgspec.Struct, frozen=True):
    """It will not be answered. ``status``: HTTP's."""

    error: str
    status: int


class _Kept(msgspec.Struct, frozen=True):
    messages: list[dict[str, Any]]
    params: dict[str, Any]
    headers: dict[str, str]
    metadata: dict[str, str]
    fields: dict[str, str]
    extras: dict[str, Any]


def pack(request: TierRequest) -> bytes:
    """InvalidRequest for what cannot be deferred."""
    if not isinstance(request.prompt, Messages):
        raise InvalidRequest("only chats can be deferred", "service_tier")
    about = request.about
    params = {**asdict(request.params), "logit_bias": {str(k): v for k, v in request.params.logit_bias.items()}}
    messages = [dict(message) for message in request.prompt.messages]
    parts = (dict(each) for each in (about.headers, about.metadata, about.fields, about.extras))
    return msgspec.json.encode(_Kept(messages, params, *parts))


def unpack(body: bytes) -> TierRequest:
    kept = msgspec.json.decode(body, type=_Kept)
    given = kept.params
    given["logit_bias"] = {int(token): bias for token, bias in given["logit_bias"].items()}
    about = About(kept.headers, kept.metadata, kept.fields, kept.extras)
    return TierRequest(Messages(kept.messages), SamplingParams(**given), about)


def joined(chunks: Iterable[Chunk], n: int) -> list[Choice]:
    """The whole completions."""
    choices = [Choice() for _ in range(n)]
    for chunk in chunks:
        choice = choices[chunk.index]
        choice.text += chunk.text
        choice.finish_reason = chunk.finish_reason or choice.finish_reason
        for call in (chunk.extra or {}).get("tool_calls", ()):
            _add_call(choice, call)
    return choices


def _add_call(choice: Choice, call: dict[str, Any]) -> None:
    """OpenAI's pieces of tool calls: of one ``index`` the arguments join."""
    calls = choice.tool_calls = choice.tool_calls or []
    known = next((each for each in calls if each.get("index") == call.get("index", 0)), None)
    if known is None:
        calls.append({"index": 0, "type": "function", **call})
        return
    function, piece = known.setdefault("function", {}), call.get("function") or {}
    function["arguments"] = (function.get("arguments") or "") + (piece.get("arguments") or "")


def passing(error: EdgeError) -> bool:
    """Whether it may be over after a while."""
    if isinstance(error, TierRefused | PromptTooLong):
        return False
    return isinstance(error, TierError | LedgerError | Overloaded | EngineStopped | DeviceError)
