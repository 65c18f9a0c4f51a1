"""What a ``tokenizer.json`` may do to a text: it comes with a model, so it is not trusted.

The tokenizers library runs what the file says. Steps that make a text longer have no bound there: thirty that each
double it fill any memory. They are counted before the first text. (Regular expressions have one: the library runs them
by Oniguruma, which gives a match up after 10 million steps; :class:`edge_runtime.tokenizer.Tokenizer` makes an error of
it.)
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from edge_runtime.errors import CorruptModel

MOST_GROWTH = 128
"""Times that a text may become longer before it is split, and an answer's after it is joined. Unicode's own
normalization makes 18 characters of one at most; byte-level alphabets 4."""
_MOST_PIECE = 64
"""Bytes that a SentencePiece table (``Precompiled``) may put in a character's place; NFKC's longest has 33."""


def check_bounds(before: Sequence[Any], after: Sequence[Any]) -> None:
    """CorruptModel for a tokenizer that could make texts endlessly long.

    ``before``: what is done to a text until it is tokens (normalizer, pre-tokenizer), ``after``: to tokens until they
    are a text (decoder); as JSON values in the library's own writing, which no trick in a file makes ambiguous."""
    for parts in (before, after):
        growth = 1
        for step in _steps(list(parts)):
            growth *= _growth(step)
            if growth > MOST_GROWTH:
                raise CorruptModel(f"the tokenizer could make a text more than {MOST_GROWTH} times as long")


def _steps(step: Any) -> Iterator[Mapping[str, Any]]:
    """A step, or those of a sequence."""
    waiting = [step]
    while waiting:
        each = waiting.pop()
        if isinstance(each, Mapping):
            yield each
            waiting += [value for value in each.values() if isinstance(value, list | Mapping)]
        elif isinstance(each, list):
            waiting += each


def _growth(step: Mapping[str, Any]) -> int:
    """Times that a text of many characters becomes longer, at most."""
    kind, content, pattern = step.get("type"), step.get("content"), step.get("pattern")
    if kind == "ByteLevel":
        return 4
    if kind == "Precompiled":
        return _table_growth(step.get("precompiled_charsmap"))
    if kind == "Prepend":  # to each part between special tokens, which may have a single character
        return 1 + _length(step.get("prepend"))
    if kind == "Replace":
        replaced = _length(pattern.get("String")) if isinstance(pattern, Mapping) else 0
        # an expression may match a single character, or nothing between two
        return max(1, -(-_length(content) // replaced)) if replaced else 1 + _length(content)
    return 1


def _length(text: object) -> int:
    return len(text) if isinstance(text, str) else 0


def _table_growth(table: Any) -> int:
    """A trie's size in 4 bytes, the trie, then replacements with a NUL behind each (SentencePiece's normalizer.cc)."""
    if not isinstance(table, str):
        return 1
    try:
        data = base64.b64decode(table, validate=True)
    except binascii.Error as error:
        raise CorruptModel("the tokenizer's precompiled_charsmap is not base64") from error
    longest = max(map(len, data[4 + int.from_bytes(data[:4], "little") :].split(b"\0")), default=0)
    if longest > _MOST_PIECE:
        raise CorruptModel(
            f"the tokenizer puts {longest} bytes in the place of a character; {_MOST_PIECE} are possible"
        )
    return 18  # as Unicode's own
