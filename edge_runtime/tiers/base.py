"""A tier: something that answers requests, such as a model on a local device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from edge_runtime.request import Chunk
from edge_runtime.sampling import SamplingParams


@dataclass(frozen=True)
class Messages:
    """A conversation; the model's chat template turns it into a prompt."""

    messages: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Text:
    """Plain text to go on from."""

    text: str


@dataclass(frozen=True)
class TokenIds:
    """Token ids as they are."""

    ids: Sequence[int]


@dataclass(frozen=True)
class TierRequest:
    """What is asked of a tier."""

    prompt: Messages | Text | TokenIds
    params: SamplingParams


@dataclass(frozen=True)
class Fit:
    """How a request fits a tier, as far as the tier can tell without starting it."""

    prompt_tokens: int
    max_prompt: int
    max_context: int
    """Prompt and answer together."""


class Tier(Protocol):
    """All methods may be called from any thread, several at a time."""

    @property
    def name(self) -> str:
        """As it appears in ``Chunk.tier``."""

    def fit(self, request: TierRequest) -> Fit:
        """Raises TemplateError or InvalidRequest if the request makes no prompt."""

    def stream(self, request: TierRequest) -> Iterator[Chunk]:
        """The answer as it is made; closing the iterator cancels it. Errors of the request raise before the first
        chunk: TemplateError, InvalidRequest, PromptTooLong, Overloaded, EngineStopped; a failure in mid-answer
        raises there."""
