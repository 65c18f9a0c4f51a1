"""What routing knows of a request before anything has run: its text, its length and what it says of itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from edge_runtime.policy.language import language_of
from edge_runtime.prompts import About, Messages, Text, TierRequest
from edge_runtime.sampling import SamplingParams


@dataclass(frozen=True)
class Facts:
    """Of one request. ``tokens``: of the whole prompt, by the local model's template and tokenizer."""

    request: TierRequest
    tokens: int

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def about(self) -> About:
        return self.request.about

    @cached_property
    def messages(self) -> Sequence[Mapping[str, Any]]:
        """Plain text is a message of its own; token ids are none."""
        prompt = self.request.prompt
        if isinstance(prompt, Messages):
            return prompt.messages
        return [{"role": "user", "content": prompt.text}] if isinstance(prompt, Text) else []

    @cached_property
    def question(self) -> str:
        """The last message of the user."""
        return next((text_of(each) for each in reversed(self.messages) if each.get("role") == "user"), "")

    @cached_property
    def history(self) -> str:
        """All the rest."""
        texts = [text_of(each) for each in self.messages]
        return "\n".join(texts)[: -len(self.question) or None] if texts else ""

    @cached_property
    def language(self) -> str | None:
        return language_of(self.question)


def text_of(message: Mapping[str, Any]) -> str:
    """Its text, of several parts one after the other."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    return "\n".join(str(part.get("text", "")) for part in content or () if isinstance(part, Mapping))
