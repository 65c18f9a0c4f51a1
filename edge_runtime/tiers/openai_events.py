"""The events of an OpenAI-compatible endpoint's answer, as chunks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from edge_runtime.request import Chunk, FinishReason, Usage

_ENDS: Mapping[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
    "content_filter": "content_filter",
}


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _Call(msgspec.Struct):
    """A piece of a call, as far as it is read here: what else a server says of it is passed on."""

    index: int | None = None
    id: str | None = None
    type: str | None = None
    function: _Function | None = None


class _Extra(msgspec.Struct):
    """What a delta may have beside text."""

    tool_calls: list[_Call] | None = None
    refusal: str | None = None


class Nonsense(ValueError):
    """What came is no part of an answer."""


class Broken(ValueError):
    """The server says in the stream that it has failed."""


class EventParser:
    """The ``data`` of a stream's events → chunks."""

    def __init__(self, tier: str, n: int, key: str | None = None) -> None:
        """``key``: what no message may hold, though the server repeats it."""
        self._tier = tier
        self._key = key
        self._n = n
        self.done = False
        """``[DONE]`` has come."""
        self.ended: set[int] = set()
        """Completions whose last chunk has come."""
        self.usage: Usage | None = None

    @property
    def complete(self) -> bool:
        """Every completion has its end: nothing of the answer is missing."""
        return len(self.ended) == self._n

    def add(self, data: str) -> Iterator[Chunk]:
        """Nonsense, Broken."""
        if data.strip() == "[DONE]":
            self.done = True
            return
        try:
            event = msgspec.json.decode(data)
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
            raise Nonsense(f"an event is not JSON: {self._start(data)!r}") from error
        if not isinstance(event, dict):
            raise Nonsense(f"an event is no object: {self._start(data)!r}")
        if event.get("error"):
            raise Broken(f"the server broke off: {message_of(event, self._key)}")
        self.usage = _usage(event.get("usage")) or self.usage
        choices = event.get("choices")
        if not isinstance(choices, list):
            raise Nonsense(f"an event has no choices: {self._start(data)!r}")
        for choice in choices:
            chunk = self._chunk(choice)
            if chunk is not None:
                yield chunk

    def _chunk(self, choice: Any) -> Chunk | None:
        if not isinstance(choice, dict):
            raise Nonsense(f"a choice is no object: {self._start(repr(choice))}")
        index, reason = choice.get("index", 0), choice.get("finish_reason")
        if not isinstance(index, int) or not 0 <= index < self._n or index in self.ended:
            raise Nonsense(f"it answers for a completion that was not asked for or is over: {self._start(repr(index))}")
        delta = choice.get("delta", choice)
        if not isinstance(delta, dict):
            raise Nonsense(f"a delta is no object: {self._start(repr(delta))}")
        text = delta.get("content" if "delta" in choice else "text")
        if not isinstance(text, str | None):
            raise Nonsense(f"the text is no text: {self._start(repr(text))}")
        if reason is not None and (not isinstance(reason, str) or reason not in _ENDS):
            raise Nonsense(f"it ends for an unknown reason: {self._start(repr(reason))}")
        extra = (
            {name: delta[name] for name in ("tool_calls", "refusal") if delta.get(name)} if delta is not choice else {}
        )
        try:
            msgspec.convert(extra, _Extra)
        except msgspec.ValidationError as error:
            raise Nonsense(f"a delta is not as OpenAI's are: {error}") from error
        if reason is not None:
            self.ended.add(index)
        elif not text and not extra:
            return None
        return Chunk(
            text or "",
            finish_reason=None if reason is None else _ENDS[reason],
            index=index,
            tier=self._tier,
            extra=extra or None,
        )

    def _start(self, text: str) -> str:
        return without(self._key, text)[:80]


def message_of(body: Any, key: str | None = None) -> str:
    """The message of an error body, however it is made, without ``key``; at most 200 characters."""
    error = body.get("error", body) if isinstance(body, dict) else body
    text = error.get("message") or error.get("detail") or error if isinstance(error, dict) else error
    return without(key, " ".join(str(text).split()))[:200]


def without(key: str | None, text: str) -> str:
    """Some servers repeat it. Before a text is cut, lest a part of it stay."""
    return text if not key else text.replace(key, "[the key]")


def _usage(value: Any) -> Usage | None:
    if not isinstance(value, dict):
        return None
    details = value.get("prompt_tokens_details")
    prompt, completion = _count(value.get("prompt_tokens")), _count(value.get("completion_tokens"))
    cached = _count(details.get("cached_tokens")) if isinstance(details, dict) else 0
    return None if prompt is None or completion is None else Usage(prompt, completion, cached or 0)


def _count(value: Any) -> int | None:
    sound = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**40
    return value if sound else None
