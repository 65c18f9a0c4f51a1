"""What comes out of the engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import msgspec

from devices.kv_types import KVType
from edge_runtime.errors import EdgeError
from edge_runtime.sampling import TokenLogprob

FinishReason = Literal["stop", "length", "cancelled", "error", "tool_calls", "content_filter"]
"""The last comes from other servers only."""


class Kind(NamedTuple):
    """What two sequences must have in common to share KV cache."""

    long_rope: bool = False
    """On the long rotary factors (longrope)."""
    kv_type: KVType | None = None
    """None: the device's only one."""


PLAIN = Kind()


@dataclass(frozen=True)
class Usage:
    """Tokens of one generation; with ``n`` completions the prompt counts once."""

    prompt_tokens: int
    completion_tokens: int
    """Sampled tokens, the one that ended a completion included."""
    cached_tokens: int = 0
    """Prompt tokens that came from the prefix cache."""

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


LOCAL = "local"
"""The tier that an engine's chunks are of, unless a policy calls it otherwise."""


class Chunk(msgspec.Struct, frozen=True):  # made for every token: a frozen dataclass takes seven times as long
    """A piece of a completion. Texts of one ``index`` join to the whole text.

    A failure is a chunk too, so that a consumer of several completions sees which one failed:
    ``finish_reason == "error"`` with ``error`` set. :meth:`checked` raises it.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    """Tokens sampled since the last chunk, stop tokens included. Their text may come with a later chunk."""
    finish_reason: FinishReason | None = None
    """Set on the last chunk of each ``index``."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One per token of ``token_ids`` if asked for, else empty."""
    usage: Usage | None = None
    """Set on the very last chunk of a generation."""
    index: int = 0
    """Which of the ``n`` completions."""
    error: EdgeError | None = None
    tier: str = LOCAL
    extra: dict[str, Any] | None = None
    """What is said beside text, as OpenAI's deltas hold it: ``tool_calls``, and of other servers ``refusal``."""

    def checked(self) -> Chunk:
        """This chunk; raises ``error`` if there is one."""
        if self.error is not None:
            raise self.error
        return self


__all__ = ["LOCAL", "PLAIN", "Chunk", "FinishReason", "Kind", "TokenLogprob", "Usage"]
