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
from edge_runtime.grammar import Grammar
from edge_runtime.prompts import About, Messages, TierRequest
from edge_runtime.request import Chunk, Usage
from edge_runtime.sampling import SamplingParams
from edge_runtime.tools.pieces import add_call


class Choice(msgspec.Struct):
    """One completion."""

    text: str = ""
    finish_reason: str | None = None
    tool_calls: list[dict[str, Any]] = []


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
    if given.get("grammar") is not None:
        given["grammar"] = Grammar(**given["grammar"])
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
            add_call(choice.tool_calls, call)
    return choices


def passing(error: EdgeError) -> bool:
    """Whether it may be over after a while."""
    if isinstance(error, TierRefused | PromptTooLong):
        return False
    return isinstance(error, TierError | LedgerError | Overloaded | EngineStopped | DeviceError)
