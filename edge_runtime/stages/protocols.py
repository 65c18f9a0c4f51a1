"""What a stage can be. It is one of these by having the method; one class may be several.

A stage is made without arguments when the policy is read, lives until the next version of it, and is called from
several threads. Where it raises it is put aside, with the reason, until then; the request goes on without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from edge_runtime.detokenizer import TokenText
from edge_runtime.facts import Facts

Conversation = Sequence[Mapping[str, Any]]


class SignalStage(Protocol):
    """Says something of a request before anything has run; a calibration may weigh it."""

    def signals(self, facts: Facts) -> Mapping[str, float]: ...


class CheckStage(Protocol):
    """Looks at how a local answer begins."""

    def problem(self, text: str, tokens: Sequence[int], ended: bool, facts: Facts) -> str | None:
        """Why it is not good enough, in words; None: nothing is wrong. ``ended``: that is the whole answer."""


class ContextStage(Protocol):
    """Makes a conversation shorter that no tier of its class could take."""

    def shorten(self, messages: Conversation, count: Callable[[Conversation], int], room: int) -> Conversation:
        """At most ``room`` tokens, as ``count`` counts them, if it can; the last message stays."""


class TextFilter(Protocol):
    """Of one completion. The pieces it gives join to the text that is passed on."""

    def add(self, text: str) -> str: ...

    def flush(self) -> str:
        """What it still holds, at the end."""


class OutputStage(Protocol):
    """Changes what an answer says, whoever makes it."""

    def output(self, facts: Facts) -> TextFilter:
        """One for each completion."""


class DecodingStage(Protocol):
    """Turns a local model's tokens into text, in place of the tokenizer's own way."""

    def decoding(self, decode: Callable[[Sequence[int]], str]) -> TokenText:
        """``decode``: the tokenizer's, of any number of tokens."""


Stage = SignalStage | CheckStage | ContextStage | OutputStage | DecodingStage
METHODS = ("signals", "problem", "shorten", "output", "decoding")
"""By which a stage is known."""
