"""The one way in for a ``tokenizer.json``: what the tokenizers library does not survive is refused before it.

The library takes the file's word for sizes: a normalizer of type Precompiled (SentencePiece's table of characters) that
says it is 4 GiB long makes it reserve 8, and so do the ids below a token's id of 4 billion when it writes itself as
JSON; where there is not so much memory the process is aborted. Where its own checks are assertions it panics, which
Python sees as an exception that is no ``Exception``.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from edge_runtime.errors import CorruptModel, EdgeError
from edge_runtime.tokenizer_bounds import check_bounds

if TYPE_CHECKING:
    from tokenizers import Tokenizer


MAX_ID = 999_999
"""Of a token; the largest vocabularies have a quarter of that."""
MAX_TOKEN = 1024
"""Characters of a token. The longest in use are runs of some hundred spaces; merges are found in time that grows with
the square of it."""
_LARGE_NUMBER = re.compile(r":\s*\d{7}")
"""What an id over :data:`MAX_ID` looks like: a look at the whole vocabulary is for those who may have one."""
_ESCAPED_LETTER = re.compile(r"\\u00[4-7]")
_TABLE = re.compile(r'"precompiled_charsmap"\s*:\s*')
_LONG = re.compile(rf'"[^"]{{{MAX_TOKEN + 1}}}')
_REST = re.compile(r'(?:[^"\\]++|\\.)*+')
"""Of a JSON string, from behind its first quote on."""


def open_tokenizer(text: str) -> Tokenizer:
    """``text`` is the file's. CorruptModel if the library does not accept it or would not survive it, and if it could
    make texts endlessly long (:mod:`edge_runtime.tokenizer_bounds`)."""
    import tokenizers  # late: `import edge_runtime` stays light

    if _ESCAPED_LETTER.search(text):
        text = _spelled_out(text)
    _check_tables(text)
    with library_errors(CorruptModel, "the tokenizer is not valid"):
        tokenizer = tokenizers.Tokenizer.from_str(text)
    check_bounds(tokenizer)
    if _LARGE_NUMBER.search(text):
        highest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
        if highest > MAX_ID:
            raise CorruptModel(f"the tokenizer is not valid: it has the token id {highest}; {MAX_ID} is possible")
    with library_errors(CorruptModel, "the tokenizer is not valid"):
        tokens = (each for each in _long_strings(text) if tokenizer.token_to_id(each) is not None)
        if (long := next(tokens, None)) is not None:
            raise CorruptModel(
                f"the tokenizer is not valid: a token has {len(long)} characters; {MAX_TOKEN} are possible"
            )
    return tokenizer


def is_panic(error: BaseException) -> bool:
    """A library in Rust has failed an assertion: PyO3 raises that past ``except Exception``, and each library has a
    class of its own for it."""
    return type(error).__module__ == "pyo3_runtime"


@contextmanager
def library_errors(kind: type[EdgeError], what: str) -> Iterator[None]:
    """Whatever a library in Rust raises, its panics too, becomes ``kind`` with ``what`` before the message."""
    try:
        yield
    except EdgeError:
        raise
    except Exception as error:  # the libraries raise bare Exception
        raise kind(f"{what}: {error}") from error
    except BaseException as error:
        if not is_panic(error):
            raise
        raise kind(f"{what}: {error}") from error


def _long_strings(text: str) -> Iterator[str]:
    """All strings of more than :data:`MAX_TOKEN` characters in ``text``, which is valid JSON; what stands between
    strings may be among them. Hardly a file has any but a table of characters: of these alone more than the next quote
    is looked for."""
    # Every string begins at a quote that no backslash precedes; one that ends in a backslash seems to be longer
    for begin in _LONG.finditer(text.replace('\\"', "  ")):
        written = _REST.match(text, begin.start() + 1)
        if written is not None and len(written[0]) > MAX_TOKEN:
            string: str = json.loads(f'"{written[0]}"', strict=False)  # not strictly: there are lines between strings
            if len(string) > MAX_TOKEN:
                yield string


def _spelled_out(text: str) -> str:
    """The same JSON, without letters that are spelled as escapes. CorruptModel."""
    try:
        return json.dumps(json.loads(text), ensure_ascii=False)
    except (ValueError, RecursionError) as error:
        raise CorruptModel(f"the tokenizer is not valid: {error}") from error


def _check_tables(text: str) -> None:
    """Every one that there is, also of keys that stand twice: whichever the library reads is sound. CorruptModel."""
    for key in _TABLE.finditer(text):
        try:
            table, _ = json.JSONDecoder().raw_decode(text, key.end())
        except (ValueError, RecursionError) as error:
            raise CorruptModel(f"the tokenizer is not valid: {error}") from error
        _check_table(table)


def _check_table(table: Any) -> None:
    """Four bytes with the length of a trie of 32-bit units, the trie, and the text that it refers to."""
    if table is None:
        return
    try:
        data = base64.b64decode(table, validate=True)
    except (TypeError, ValueError, binascii.Error) as error:
        raise CorruptModel(f"the tokenizer is not valid: precompiled_charsmap is not Base64: {error}") from error
    size = int.from_bytes(data[:4], "little")
    if len(data) < 4 or size % 4 or size > len(data) - 4:
        raise CorruptModel(
            f"the tokenizer is not valid: precompiled_charsmap says that it has {size} bytes, and has {len(data)}"
        )
