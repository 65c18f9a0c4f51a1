"""Streamed text equals whole text, for byte-level BPE and for SentencePiece-like tokenizers with byte fallback."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from edge_runtime.detokenizer import StopStrings, StreamDecoder

PIECES = [
    "hello",
    " world",
    "e",
    "é",
    "e\u0301",
    "你",
    "👩‍👩‍👧",
    "🇫🇷",
    " ",
    "  ",
    "\n",
    "�",
    "<0x41>",
    "ก็",
    "0",
    "don",
    "'t",
]


def byte_level() -> Tokenizer:
    """All 256 bytes, and some longer tokens that cut characters at awkward places."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    encode = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = [encode.pre_tokenize_str(piece)[0][0] for piece in PIECES if piece.strip()]
    cut = [word[:n] for word in words for n in range(2, len(word))] + [word[n:] for word in words for n in (1, 2)]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(t for t in alphabet + words + cut if t))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_end|>"])
    tokenizer.add_tokens([AddedToken("→tool", normalized=False)])
    return tokenizer


def sentence_piece() -> Tokenizer:
    """Llama 2's decoder: ▁ for spaces, byte fallback, one leading space stripped."""
    words = [piece.replace(" ", "▁") for piece in PIECES if not piece.startswith("<")] + ["▁▁", "▁hello", "."]
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *dict.fromkeys(words)]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


TOKENIZERS = {"byte-level": byte_level(), "sentencepiece": sentence_piece()}


class Forgetful(dict[int, str]):
    """Keeps nothing, so that every token is decoded where it stands."""

    def __setitem__(self, token: int, text: str) -> None:
        pass


ADDITIONS: dict[str, dict[int, str]] = {name: {} for name in TOKENIZERS}
"""What tokens add, kept from one stream to the next as the engine does."""


def stream(tokenizer: Tokenizer, ids: list[int], additions: dict[int, str] | None = None) -> list[str]:
    decoder = StreamDecoder(tokenizer, additions)
    return [*(decoder.add(token) for token in ids), decoder.flush()]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=400)
@given(data=st.data())
def test_any_tokens_join_to_the_whole_text(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() + 3), max_size=120))
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=200)
@given(
    text=st.lists(st.sampled_from([*PIECES, "ß", "𝔘", "\u200d", "ẹ̀"]), max_size=60).map("".join),
    offset=st.integers(0, 5),
)
def test_valid_text_in_bytes_joins_to_the_whole_text(name: str, text: str, offset: int) -> None:
    tokenizer = TOKENIZERS[name]
    if name == "byte-level":
        shown = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
        ids = [tokenizer.token_to_id(char) for token, _ in shown for char in token]
    else:
        ids = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in text.encode()]
    ids = [*ids[:offset], tokenizer.get_vocab_size() + 1, *ids[offset:]]
    pieces = stream(tokenizer, ids, ADDITIONS[name])
    assert pieces == stream(tokenizer, ids, Forgetful())
    assert "".join(pieces) == tokenizer.decode(ids)
    assert "".join(pieces) == (text if name == "byte-level" else text.removeprefix(" "))


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=400)
@given(data=st.data())
def test_what_is_looked_up_is_what_is_decoded(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() + 3), max_size=120))
    assert stream(tokenizer, ids, ADDITIONS[name]) == stream(tokenizer, ids, Forgetful())


def test_a_known_token_is_not_decoded_again() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    calls: list[list[int]] = []

    class Counting:
        def decode(self, ids: list[int], skip_special: bool = True, /) -> str:
            calls.append(ids)
            return str(tokenizer.decode(ids, skip_special))

        def id_to_token(self, token_id: int, /) -> str | None:
            token: str | None = tokenizer.id_to_token(token_id)
            return token

    additions: dict[int, str] = {}
    ids = [tokenizer.token_to_id(char) for char in "abcabc"]
    for _ in range(2):
        calls.clear()
        decoder = StreamDecoder(Counting(), additions)
        assert [decoder.add(token) for token in ids] == list("abcabc")
    assert len(calls) == 2, "only the first token, which has no text before it"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_work_per_token_is_bounded(name: str) -> None:
    class Counting:
        longest = 0

        def decode(self, ids: list[int], skip_special: bool = True, /) -> str:
            self.longest = max(self.longest, len(ids))
            return str(TOKENIZERS[name].decode(ids, skip_special))

        def id_to_token(self, token_id: int, /) -> str | None:
            token: str | None = TOKENIZERS[name].id_to_token(token_id)
            return token

    counting = Counting()
    decoder = StreamDecoder(counting)
    for _ in range(40):
        for token in range(TOKENIZERS[name].get_vocab_size()):
            if not re.fullmatch("<0x..>", TOKENIZERS[name].id_to_token(token)):
                decoder.add(token)
    assert counting.longest <= 32


def test_text_is_shown_as_soon_as_it_is_certain() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    ids = [tokenizer.token_to_id(char) for char in "aä½łb"]  # a, the three bytes of 你, b
    assert stream(tokenizer, ids) == ["a", "", "", "你", "b", ""]


@given(
    text=st.text("abc", max_size=40),
    stops=st.lists(st.text("abc", min_size=1, max_size=5), max_size=3),
    cuts=st.lists(st.integers(0, 40), max_size=8),
)
def test_stop_strings_cut_at_the_first_wherever_the_pieces_end(text: str, stops: list[str], cuts: list[int]) -> None:
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    matcher = StopStrings(stops)
    shown, met = "", False
    for start, end in itertools.pairwise(places):
        piece, met = matcher.add(text[start:end])
        shown += piece
        # nothing shown may be the beginning of a stop string that the present text still allows
        assert not any(shown.endswith(stop) for stop in stops)
        if met:
            break
    shown += "" if met else matcher.flush()
    assert met == any(stop in text for stop in stops)
    if not met:
        assert shown == text
    else:
        assert text.startswith(shown)
        assert not any(stop in shown for stop in stops)
        assert any(text[len(shown) :].startswith(stop) for stop in stops)


def test_only_a_possible_start_is_held_back() -> None:
    matcher = StopStrings(["</end>"])
    assert matcher.add("a <") == ("a ", False)
    assert matcher.add("/en") == ("", False)
    assert matcher.add("try") == ("</entry", False)
    assert matcher.add("</") == ("", False)
    assert matcher.flush() == "</"
