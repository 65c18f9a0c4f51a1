"""Requests and answers as the queue keeps them: JSON."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, TypeVar

import msgspec

from edge_runtime.errors import (
    DeviceError,
    EdgeError,
    EngineStopped,
    InvalidRequest,
    LedgerError,
    Overloaded,
    PromptTooLong,
    StorageError,
    TierError,
    TierRefused,
)
from edge_runtime.prompts import About, Messages, TierRequest
from edge_runtime.request import Chunk, Usage
from edge_runtime.sampling import SamplingParams
from edge_runtime.tools.pieces import add_call

T = TypeVar("T")


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
    status: Annotated[int, msgspec.Meta(ge=400, le=599)]


class _Kept(msgspec.Struct, frozen=True):
    messages: list[dict[str, Any]]
    params: SamplingParams
    headers: dict[str, str]
    metadata: dict[str, str]
    fields: dict[str, str]
    extras: dict[str, Any]


def pack(request: TierRequest) -> bytes:
    """InvalidRequest for what cannot be deferred."""
    if not isinstance(request.prompt, Messages):
        raise InvalidRequest("only chats can be deferred", "service_tier")
    about = request.about
    messages = [dict(message) for message in request.prompt.messages]
    parts = (dict(each) for each in (about.headers, about.metadata, about.fields, about.extras))
    try:
        return msgspec.json.encode(_Kept(messages, request.params, *parts))
    except (TypeError, ValueError, OverflowError, RecursionError) as error:  # half a surrogate pair, an object
        raise InvalidRequest(f"what JSON cannot hold cannot be deferred: {error}") from error


def unpack(body: bytes) -> TierRequest:
    """StorageError for what :func:`pack` has not written, InvalidRequest for values that no request may have."""
    kept = read(body, _Kept)
    about = About(kept.headers, kept.metadata, kept.fields, kept.extras)
    return TierRequest(Messages(kept.messages), kept.params, about)


def read(data: bytes, kind: type[T]) -> T:
    """What the queue has kept. StorageError: it is damaged."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise StorageError(f"what the queue has kept of it is damaged: {error}") from error


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
