"""From text to token ids and back: ``tokenizer.json`` through the tokenizers library, which defines that format."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from edge_runtime.errors import CorruptModel, InvalidRequest
from edge_runtime.tokenizer_bounds import state
from edge_runtime.tokenizer_json import library_errors, open_tokenizer

_FAILS = "this model's tokenizer fails on this text"
"""Such as where a pattern of the file takes too many steps; another text may pass."""


class Tokenizer:
    """Thread safe. ``eos_ids`` end a completion; ``bos_id`` is what ``add_bos`` puts first.

    **Special tokens in text.** A name such as ``<|im_end|>`` in a text is ordinary text unless ``parse_special``
    is set; then it becomes the special token, exactly as in llama.cpp. A rendered chat is one string in which the
    template's own markers must become tokens, so it is encoded with ``parse_special=True`` and a marker that a
    message contains becomes a token too, as in Transformers and llama.cpp's server: encoding the pieces apart
    would change how they tokenize where they meet, and so what the model was trained on. Whoever may send messages
    may set any role anyway. An application that puts text of strangers into a message should take
    :attr:`special_texts` out of it first.
    """

    def __init__(self, tokenizer_json: str, *, bos_id: int | None = None, eos_ids: Iterable[int] = ()) -> None:
        """``tokenizer_json`` is the file's text. CorruptModel if the tokenizers library does not accept it, or if it
        could make texts endlessly long (:mod:`edge_runtime.tokenizer_bounds`)."""
        self._inner = open_tokenizer(tokenizer_json)
        # A saved truncation or padding would silently change prompts.
        self._inner.no_truncation()
        self._inner.no_padding()
        self._lock = threading.Lock()  # whether special tokens are parsed is a state of the inner tokenizer
        added = self._inner.get_added_tokens_decoder()
        self._added = {index: token.content for index, token in added.items()}
        self.vocab_size = self._inner.get_vocab_size(with_added_tokens=True)
        """Token ids that have a text: 0 … vocab_size-1 if there are no gaps. The model's own may be larger (padded)."""
        self.special_ids = frozenset(index for index, token in added.items() if token.special)
        """Control tokens, which ``decode`` leaves out."""
        self.special_texts = tuple(added[index].content for index in sorted(self.special_ids))
        self.bos_id = bos_id
        self.eos_ids = tuple(dict.fromkeys(eos_ids))
        self._to_bytes = _byte_reader(state(self._inner.decoder))

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Read ``tokenizer.json`` and, if there, ``generation_config.json`` (bos and eos ids).

        CorruptModel names the file that is missing or damaged.
        """
        generation = (
            _read_json(folder / "generation_config.json") if (folder / "generation_config.json").exists() else {}
        )
        eos = generation.get("eos_token_id")
        bos = generation.get("bos_token_id")
        eos_ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
        if not all(isinstance(token, int) for token in [*eos_ids, *([] if bos is None else [bos])]):
            raise CorruptModel(f"{folder / 'generation_config.json'}: token ids must be integers, not {eos!r}, {bos!r}")
        return cls(_read_text(folder / "tokenizer.json"), bos_id=bos, eos_ids=eos_ids)

    def encode(self, text: str, *, add_bos: bool = False, parse_special: bool = False) -> list[int]:
        """Token ids of ``text``. ``add_bos`` puts ``bos_id`` first: InvalidRequest if there is none.

        With ``parse_special`` the names of special tokens in ``text`` become those tokens; see the class. Added
        tokens that are not special (llama.cpp: user-defined) are always recognised. InvalidRequest if ``text`` holds
        half of a surrogate pair, which is not text.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"the text holds half a surrogate pair at character {error.start}") from error
        with self._lock, library_errors(InvalidRequest, _FAILS):
            self._inner.encode_special_tokens = not parse_special
            ids: list[int] = self._inner.encode(text, add_special_tokens=False).ids
        if not add_bos:
            return ids
        if self.bos_id is None:
            raise InvalidRequest("this model has no bos token to put before the text")
        return [self.bos_id, *ids]

    def encode_framed(self, text: str) -> tuple[list[int], int]:
        """Token ids of ``text`` with what the model wants around every text ([CLS] … [SEP]), and how many of these
        stand behind it. Names of special tokens in it are ordinary text. InvalidRequest as for :meth:`encode`."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"the text holds half a surrogate pair at character {error.start}") from error
        with self._lock, library_errors(InvalidRequest, _FAILS):
            self._inner.encode_special_tokens = True
            encoded = self._inner.encode(text, add_special_tokens=True)
        marks = encoded.special_tokens_mask
        behind = next((place for place, mark in enumerate(reversed(marks)) if not mark), len(marks))
        return list(encoded.ids), behind

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ``ids``. Ids without a text add nothing; bytes that are not UTF-8 become U+FFFD.

        InvalidRequest if an id is negative or over 32 bits."""
        with library_errors(InvalidRequest, _FAILS):
            try:
                text: str = self._inner.decode(list(ids), skip_special_tokens=skip_special_tokens)
            except OverflowError as error:
                raise InvalidRequest("token ids must be from 0 to 4294967295") from error
        return text

    @property
    def json(self) -> str:
        """``tokenizer.json``."""
        text: str = self._inner.to_str()
        return text

    def id_to_token(self, token_id: int) -> str | None:
        """The vocabulary's own string, e.g. ``"Ġthe"``, ``"▁the"`` or ``"<0x0A>"``; None: no such token."""
        token: str | None = self._inner.id_to_token(token_id)
        return token

    def token_to_id(self, token: str) -> int | None:
        """The id of the vocabulary's own string; None: no such token."""
        token_id: int | None = self._inner.token_to_id(token)
        return token_id

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that the token stands for in running text: maybe only a part of a character.

        Special and added tokens give their name; an id without a token gives nothing. Concatenated over a
        text's tokens they are its UTF-8, save for a space that SentencePiece tokenizers drop at the very start.
        """
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self.id_to_token(token_id)
        return b"" if token is None else self._to_bytes(token)


# --- bytes of a token -------------------------------------------------------------------------------------------------


_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")


def _byte_reader(decoder: Any) -> Callable[[str], bytes]:
    """How this tokenizer spells bytes, from its decoder: GPT-2's alphabet, or SentencePiece's ``▁`` and ``<0x0A>``."""
    decoders = [] if decoder is None else _flatten(decoder)
    kinds = {decoder["type"] for decoder in decoders}
    if "ByteLevel" in kinds:
        return _ByteLevel().read
    spaces = {d["replacement"] for d in decoders if d["type"] == "Metaspace"}
    patterns = [d["pattern"] for d in decoders if d["type"] == "Replace" and d.get("content") == " "]
    spaces |= {pattern["String"] for pattern in patterns if pattern.get("String")}  # a regex spells nothing

    def read(token: str) -> bytes:
        if "ByteFallback" in kinds and _BYTE.fullmatch(token):
            return bytes.fromhex(token[3:5])
        for space in spaces:
            token = token.replace(space, " ")
        return token.encode()

    return read


def _flatten(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    if decoder["type"] != "Sequence":
        return [decoder]
    return [inner for part in decoder["decoders"] for inner in _flatten(part)]


class _ByteLevel:
    """GPT-2's printable alphabet for the 256 bytes (``bytes_to_unicode`` in openai/gpt-2's encoder.py)."""

    def __init__(self) -> None:
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(256) if byte not in printable]
        self._bytes = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}

    def read(self, token: str) -> bytes:
        try:
            return bytes(self._bytes[character] for character in token)
        except KeyError:
            return token.encode()  # not made of bytes: a token added without being listed as such


# --- files ------------------------------------------------------------------------------------------------------------


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CorruptModel(f"{path} cannot be read ({error}); pull or export the model again") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise CorruptModel(f"{path} is not valid JSON ({error}); pull or export the model again") from error
    if not isinstance(value, dict):
        raise CorruptModel(f"{path} must hold an object, not {type(value).__name__}; pull or export the model again")
    return value
