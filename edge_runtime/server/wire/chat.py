"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edge_runtime.errors import InvalidRequest
from edge_runtime.grammar import Grammar
from edge_runtime.prompts import About
from edge_runtime.sampling import SamplingParams
from edge_runtime.server.wire.messages import Message, check_messages
from edge_runtime.server.wire.parse import asks_nothing, refuse_unsupported, unsupported
from edge_runtime.server.wire.response_format import ResponseFormat
from edge_runtime.server.wire.sampling import SamplingFields, check_sampling, sampling_params
from edge_runtime.tools.wish import FIELDS, ToolWish

_PASSED_ON = ("functions", "function_call")
"""What models here do not know, and a server elsewhere may."""


class ChatRequest(SamplingFields, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: Any = None
    functions: Any = None
    function_call: Any = None
    response_format: ResponseFormat | None = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    web_search_options: Any = None

    def check(self) -> None:
        """InvalidRequest for what the types do not say."""
        refuse_unsupported(self, passed_on=_PASSED_ON)
        check_sampling(self)
        check_messages(self.messages)
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs to be true", "top_logprobs")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise InvalidRequest("max_tokens and max_completion_tokens mean the same: send one", "max_tokens")

    def about(self, headers: Mapping[str, str], takes_extras: bool) -> About:
        """What routing may go by. InvalidRequest for wishes that would have to be passed on and cannot be."""
        extras = {name: value for name in _PASSED_ON if not asks_nothing(name, value := getattr(self, name))}
        if extras and not takes_extras:
            raise unsupported(next(iter(extras)))
        tools = {name: value for name in FIELDS if (value := getattr(self, name)) is not None}
        if not takes_extras:
            ToolWish.of(tools)
        return self.about_request(headers, extras | (tools if tools.get("tools") else {}))

    @property
    def limit_field(self) -> str:
        """By which it says how long the answer may be."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def grammar(self) -> Grammar | None:
        return None if self.response_format is None else self.response_format.grammar()

    def params(self) -> SamplingParams:
        alternatives = None
        if self.logprobs:
            alternatives = self.top_logprobs or 0
        limit = self.max_completion_tokens if self.max_tokens is None else self.max_tokens
        renamed = {"logprobs": "top_logprobs"}
        if self.max_tokens is None:
            renamed["max_tokens"] = "max_completion_tokens"
        return sampling_params(self, limit, alternatives, renamed, self.grammar)
