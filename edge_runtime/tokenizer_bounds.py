"""What a ``tokenizer.json`` may do to a text: it comes with a model, so it is not trusted.

The tokenizers library runs what the file says. Steps that make a text longer have no bound there: thirty that each
double it fill any memory. They are counted before the first text. (Regular expressions have one: the library runs them
by Oniguruma, which gives a match up after 10 million steps; :class:`edge_runtime.tokenizer.Tokenizer` makes an error of
it.)
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edge_runtime.errors import CorruptModel

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MOST_GROWTH = 128
"""Times that a text may become longer until it is ids, and an answer's ids until they are a text; besides what each of
Unicode's own forms does once."""
MOST_AROUND = 128
"""Ids that may be put around a text; [CLS] and [SEP] are two."""
_MOST_PIECE = 64
"""Bytes that a SentencePiece table (``Precompiled``) may put in a character's place; NFKC's longest has 33."""
_FORMS = {"NFC": 3, "NFD": 4, "NFKC": 18, "NFKD": 18, "Lowercase": 2, "BertNormalizer": 4}
"""Characters that they make of one, at most. Twice the same makes no more; with a replacement between, it does."""


def check_bounds(tokenizer: Tokenizer) -> None:
    """CorruptModel for a tokenizer that could make texts endlessly long."""
    before = [state(each) for each in (tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.post_processor)]
    for parts in (before, [state(tokenizer.decoder)]):
        growth, forms = 1, set()
        for step in _steps(parts):
            kind = step.get("type")
            growth *= _growth(step)
            if isinstance(kind, str) and kind in _FORMS:
                growth *= _FORMS[kind] if kind in forms else 1
                forms.add(kind)
            if growth > MOST_GROWTH:
                raise CorruptModel(f"the tokenizer could make a text more than {MOST_GROWTH} times as long")


def state(part: Any) -> Any:
    """A part of a tokenizer as it stands in ``tokenizer.json``: in the library's own writing, which no trick in a file
    makes ambiguous."""
    return None if part is None else json.loads(part.__getstate__())


def _steps(parts: Sequence[Any]) -> Iterator[Mapping[str, Any]]:
    """Each step, those of sequences, too."""
    waiting = list(parts)
    while waiting:
        each = waiting.pop()
        if isinstance(each, Mapping):
            yield each
            waiting += [value for value in each.values() if isinstance(value, list | Mapping)]
        elif isinstance(each, list):
            waiting += each


def _growth(step: Mapping[str, Any]) -> int:
    """Times that a text becomes longer, at most. It may have a single character: so do parts between special tokens,
    what a pre-tokenizer splits, and tokens that are joined."""
    kind, pattern = step.get("type"), step.get("pattern")
    if kind == "ByteLevel":
        return 4 + bool(step.get("add_prefix_space"))
    if kind == "Precompiled":
        return _table_growth(step.get("precompiled_charsmap"))
    if kind == "Prepend":
        return 1 + _length(step.get("prepend"))
    if kind == "Metaspace" and step.get("prepend_scheme") != "never":  # of a decoder it adds nothing, but is there once
        return 1 + _length(step.get("replacement"))
    if kind == "BertNormalizer" and step.get("handle_chinese_chars"):
        return 3  # a space on either side
    if kind == "WordPiece":
        return 2  # a space before each
    if kind == "Replace":
        return _replaced(pattern.get("String") if isinstance(pattern, Mapping) else None, step.get("content"))
    if kind == "BPEDecoder":
        return _replaced(step.get("suffix"), " ")
    if kind == "CTC":
        return _replaced(step.get("word_delimiter_token"), " ")
    if kind == "TemplateProcessing":
        return _template_growth(step)
    return 1


def _length(text: object) -> int:
    return len(text) if isinstance(text, str) else 0


def _replaced(text: object, content: object) -> int:
    """``text`` by ``content``; None: what an expression matches."""
    replaced = _length(text)
    # nothing is found on either side of a character, and an expression may match nothing
    return max(1, -(-_length(content) // replaced)) if replaced else 1 + 2 * _length(content)


def _template_growth(step: Mapping[str, Any]) -> int:
    """How often it puts the text; the library does so even where no special tokens are wanted."""
    special, times, around = step.get("special_tokens") or {}, 0, 0
    for piece in step.get("single") or ():
        if "Sequence" in piece:
            times += 1
        else:
            around += len(special.get(piece["SpecialToken"]["id"], {}).get("ids", ()))
    if around > MOST_AROUND:
        raise CorruptModel(f"the tokenizer puts {around} ids around a text; {MOST_AROUND} are possible")
    return max(times, 1)


def _table_growth(table: Any) -> int:
    """A trie's size in 4 bytes, the trie, then replacements with a NUL behind each (SentencePiece's normalizer.cc)."""
    if not isinstance(table, str):
        return 1
    try:
        data = base64.b64decode(table, validate=True)
    except binascii.Error as error:
        raise CorruptModel("the tokenizer's precompiled_charsmap is not base64") from error
    pieces = data[4 + int.from_bytes(data[:4], "little") :].split(b"\0")
    longest = max(map(len, pieces), default=0)
    if longest > _MOST_PIECE:
        raise CorruptModel(
            f"the tokenizer puts {longest} bytes in the place of a character; {_MOST_PIECE} are possible"
        )
    return max(_FORMS["NFKC"], *(len(piece.decode(errors="replace")) for piece in pieces))
