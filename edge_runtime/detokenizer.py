"""Text from a stream of tokens, and stop strings in a stream of text."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Protocol


class TokenDecoder(Protocol):
    """What the engine needs of a tokenizer; ``tokenizers.Tokenizer`` has it."""

    def decode(self, ids: Sequence[int], skip_special: bool = True, /) -> str:
        """The text of ``ids``; unknown ids add nothing."""

    def id_to_token(self, token_id: int, /) -> str | None:
        """The vocabulary's own string, e.g. ``"▁the"`` or ``"<0x0A>"``; None: no such token."""


class TokenText(Protocol):
    """Tokens of one completion as they come → text."""

    def add(self, token: int, /) -> str:
        """The text that has become certain; often empty."""

    def flush(self) -> str:
        """What was held back; ends the stream."""


Decoding = Callable[[Callable[[Sequence[int]], str], TokenText], TokenText]
"""Another way from tokens to text: the tokenizer's decoding of any number of tokens, and its own stream → a stream."""

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_UNDECODED = "\N{REPLACEMENT CHARACTER}"
_WINDOW = 32
_KEPT = 8


class StreamDecoder:
    """Turns tokens into text as they come.

    Invariant: all pieces of :meth:`add` and the one of :meth:`flush`, joined, are ``tokenizer.decode(all ids)``.
    Each token costs the decoding of at most a window of recent tokens.

    Text is held back while a later token may change it. Two things can: an unfinished UTF-8 sequence (shown as one
    U+FFFD at the end), and a run of byte-fallback tokens, which is decoded as a whole and turns to U+FFFD as a
    whole when any part of it is invalid; such a run waits for its end.

    Where nothing is held back, what a token adds does not depend on the text before it (see :meth:`_shorten`): it is
    decoded once, and looked up from then on.
    """

    def __init__(self, tokenizer: TokenDecoder, additions: dict[int, str] | None = None) -> None:
        """``additions``: what tokens were found to add, to be shared by the streams of one tokenizer in one thread."""
        self._tokenizer = tokenizer
        self._additions = {} if additions is None else additions
        self._window: list[int] = []
        self._given = 0
        """Characters of the window's text that have been returned."""
        self._whole = False
        """The window has a text, and all of it has been returned."""

    def add(self, token: int, /) -> str:
        """The text that has become certain with ``token``; often empty."""
        known = self._additions.get(token) if self._whole else None
        if known is None:
            return self._decode(token)
        self._window.append(token)
        self._given += len(known)
        if len(self._window) >= _WINDOW:
            self._shorten()
        return known

    def _decode(self, token: int) -> str:
        piece = self._tokenizer.id_to_token(token)
        if piece is None or self._is_skipped(token):
            return ""
        self._window.append(token)
        before, self._whole = self._whole, False
        if _BYTE_TOKEN.fullmatch(piece):
            return ""
        text = self._tokenizer.decode(self._window)
        new = text[self._given : _certain_length(text)]
        self._set_given(text)
        if before and self._whole:
            self._additions[token] = new
        if len(self._window) >= _WINDOW:
            self._shorten()
        return new

    def flush(self) -> str:
        """What was held back; ends the stream."""
        new = self._tokenizer.decode(self._window)[self._given :]
        self._window, self._given, self._whole = [], 0, False
        return new

    def _is_skipped(self, token: int) -> bool:
        return self._tokenizer.decode([token]) == "" != self._tokenizer.decode([token], False)

    def _shorten(self) -> None:
        # The text a token adds depends on what is before it in two ways only: on whether anything is (the leading
        # space of SentencePiece), and on the last three bytes (UTF-8). A tail that has both gives the same additions.
        tail = self._window[-_KEPT:]
        text = self._tokenizer.decode(tail)
        if text:
            self._window = tail
            self._set_given(text)

    def _set_given(self, text: str) -> None:
        """All that is certain of ``text``, the window's, has been returned."""
        self._given = _certain_length(text)
        self._whole = self._given == len(text) > 0


def _certain_length(text: str) -> int:
    return len(text) - text.endswith(_UNDECODED)


class StopStrings:
    """Cuts a stream of text before the first of some strings; text that may be the start of one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """(text that may be shown, whether a stop string was met). After a stop string, nothing more comes."""
        if not self._stops:
            return text, False
        text = self._held + text
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        keep = max((overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """What was held back, when the stream ends otherwise."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a start of ``stop`` (but not all of it)."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
