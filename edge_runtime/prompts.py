"""A tier: something that answers requests, such as a model on a local device or a server elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edge_runtime.detokenizer import Decoding
from edge_runtime.sampling import SamplingParams
from edge_runtime.watch import Watch


@dataclass(frozen=True)
class Messages:
    """A conversation; the model's chat template turns it into a prompt."""

    messages: Sequence[Mapping[str, Any]]

    @property
    def of_tools(self) -> bool:
        """It calls tools, or has their answers."""
        return any(message.get("role") == "tool" or message.get("tool_calls") for message in self.messages)


@dataclass(frozen=True)
class Text:
    """Plain text to go on from."""

    text: str


@dataclass(frozen=True)
class TokenIds:
    """Token ids as they are."""

    ids: Sequence[int]


@dataclass(frozen=True)
class About:
    """What a request says of itself beside its prompt. Routing goes by it; no model here sees it."""

    headers: Mapping[str, str] = field(default_factory=dict)
    """Of HTTP, names in lower case."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    fields: Mapping[str, str] = field(default_factory=dict)
    """Other fields of the request that hold text: ``user``, ``service_tier``, …"""
    extras: Mapping[str, Any] = field(default_factory=dict)
    """Wishes about tools (:data:`edge_runtime.tools.wish.FIELDS`), and such as models here do not know: a server that
    does gets them as they are."""

    @property
    def deferred(self) -> bool:
        """It may be answered later (OpenAI's ``service_tier: "flex"``)."""
        return self.fields.get("service_tier") == "flex"

    @property
    def tools(self) -> bool:
        return bool(self.extras.get("tools") or self.extras.get("functions"))


NOTHING = About()


@dataclass(frozen=True)
class TierRequest:
    """What is asked of a tier."""

    prompt: Messages | Text | TokenIds
    params: SamplingParams
    about: About = NOTHING
    watch: Watch | None = None
    """Who wants to know what a model here thinks of prompt and answer."""
    decoding: Decoding | None = None
    """How a model here turns tokens into text; None: the tokenizer's own way."""

    @property
    def wants_json(self) -> bool:
        grammar = self.params.grammar
        return grammar is not None and grammar.json

    @property
    def ids(self) -> Sequence[int]:
        """The prompt's token ids, once it is prepared; ValueError before."""
        if not isinstance(self.prompt, TokenIds):
            raise ValueError("the prompt is not tokenized yet")
        return self.prompt.ids


@dataclass(frozen=True)
class Fit:
    """How a request fits a tier, as far as the tier can tell without starting it."""

    prompt_tokens: int
    max_prompt: int
    max_context: int
    """Prompt and answer together."""

    def verdict(self, params: SamplingParams) -> tuple[bool, str]:
        """Whether prompt and answer have room, and the counts in words."""
        prompt = f"the prompt has {self.prompt_tokens} tokens"
        if self.prompt_tokens > self.max_prompt:
            return False, f"{prompt}, this model and device take {self.max_prompt}"
        asked = 1 if params.max_tokens is None else params.max_tokens
        if self.prompt_tokens + asked > self.max_context:
            more = "" if params.max_tokens is None else f" and max_tokens asks for {asked} more"
            return False, f"{prompt}{more}; prompt and answer together may have {self.max_context}"
        return True, f"{prompt} and fits the context of {self.max_context}"

    @property
    def short_of(self) -> str:
        """The field of the request that asks for more than there is."""
        return "prompt" if self.prompt_tokens >= min(self.max_prompt, self.max_context) else "max_tokens"
