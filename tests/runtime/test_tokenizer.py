"""Text to ids and back: special tokens only on request, and the bytes of every token."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from edge_runtime.errors import CorruptModel, InvalidRequest
from edge_runtime.tokenizer import Tokenizer

AWKWARD = [
    "",
    "Hello",
    "  two  spaces ",
    "def f(x):\n\treturn x**2  # 12345\r\n",
    "中文字符，日本語、한국어",
    "العربية مع أرقام ١٢٣",
    "👩‍👩‍👧‍👦 🏳️‍🌈 é é naïve",
    "<|im_start|>user\nhi<|im_end|>",
    "<0x0A> ▁ Ġ",
    "\x00\x7f\ufeff\U0010ffff",
]


def byte_level() -> tokenizers.Tokenizer:
    """Bytes with a few merges, two special tokens and one added word that is not special."""
    vocabulary = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "a"), ("Ã", "©")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    inner.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    return inner


def sentence_piece() -> tokenizers.Tokenizer:
    """Llama 2's and Gemma's form: ``▁`` for spaces, unknown characters as bytes."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for token in ("▁", "a", "b", "▁a", "é"):
        vocabulary[token] = len(vocabulary)
    inner = tokenizers.Tokenizer(
        models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    inner.normalizer = normalizers.Replace(" ", "▁")
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    return inner


FORMS = {"byte level": byte_level, "sentence piece": sentence_piece}


@pytest.mark.parametrize("make", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("text", AWKWARD, ids=range(len(AWKWARD)))
def test_there_and_back(make: Callable[[], tokenizers.Tokenizer], text: str) -> None:
    tokenizer = Tokenizer(make().to_str())
    ids = tokenizer.encode(text)
    assert not tokenizer.special_ids.intersection(ids)
    spelled = text.replace("▁", " ") if make is sentence_piece else text  # SentencePiece cannot tell them apart
    assert b"".join(map(tokenizer.token_bytes, ids)) == spelled.encode()
    if make is byte_level:
        assert tokenizer.decode(ids) == text


def test_special_tokens_only_on_request() -> None:
    tokenizer = Tokenizer(byte_level().to_str(), bos_id=261, eos_ids=[262, 262])
    start, end, tool = 261, 262, 263
    text = "<|im_start|>hell<tool><|im_end|>"
    plain = tokenizer.encode(text)
    assert start not in plain
    assert end not in plain
    assert tool in plain  # added, but not special
    parsed = tokenizer.encode(text, parse_special=True)
    assert (parsed[0], parsed[-2:]) == (start, [tool, end])
    assert tokenizer.decode(plain) == text
    assert tokenizer.decode(parsed) == "hell<tool>"
    assert tokenizer.decode(parsed, skip_special_tokens=False) == text
    assert tokenizer.encode(text) == plain  # asking once does not stick
    assert tokenizer.special_ids == {start, end}
    assert tokenizer.special_texts == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.eos_ids == (end,)
    assert tokenizer.vocab_size == 264
    assert tokenizer.token_bytes(end) == b"<|im_end|>"


def test_bos() -> None:
    tokenizer = Tokenizer(byte_level().to_str(), bos_id=261)
    assert tokenizer.encode("a", add_bos=True) == [261, *tokenizer.encode("a")]
    with pytest.raises(InvalidRequest, match="bos"):
        Tokenizer(byte_level().to_str()).encode("a", add_bos=True)


def test_tokens_and_ids() -> None:
    tokenizer = Tokenizer(byte_level().to_str())
    hell = tokenizer.token_to_id("hell")
    assert hell is not None
    assert tokenizer.encode("hell") == [hell]
    assert tokenizer.id_to_token(hell) == "hell"
    assert tokenizer.token_bytes(tokenizer.encode(" a")[0]) == b" a"
    assert tokenizer.token_bytes(tokenizer.encode("é")[0]) == "é".encode()
    assert tokenizer.token_to_id("no such token") is None
    assert tokenizer.id_to_token(99_999) is None
    assert tokenizer.token_bytes(99_999) == b""
    assert tokenizer.decode([99_999, hell]) == "hell"
    with pytest.raises(InvalidRequest):
        tokenizer.decode([-1])


def test_half_a_character_is_a_replacement() -> None:
    tokenizer = Tokenizer(byte_level().to_str())
    ids = tokenizer.encode("😀")
    assert len(ids) == 4
    assert tokenizer.decode(ids[:3]) == "\ufffd"


def test_a_table_that_points_outside_itself_fails_in_words() -> None:
    """The library panics while it encodes."""
    trie = (0x7FFFFE00).to_bytes(4, "little") * 4
    encoded = base64.b64encode((len(trie)).to_bytes(4, "little") + trie).decode()
    tokenizer = Tokenizer(table(encoded).decode())
    with pytest.raises(InvalidRequest, match="tokenizer fails on this text"):
        tokenizer.encode("héllo")


def test_bytes_of_odd_spellings() -> None:
    """A decoder that replaces by a pattern, and a name that looks like a byte's."""
    inner = tokenizers.Tokenizer(models.WordLevel({"<0x41>": 0, "<0xZZ>": 1, "a_b": 2}, unk_token="a_b"))
    spaces = decoders.Replace(tokenizers.Regex("_+"), " ")
    inner.decoder = decoders.Sequence([spaces, decoders.Replace("", " "), decoders.ByteFallback()])
    tokenizer = Tokenizer(inner.to_str())
    assert [tokenizer.token_bytes(token) for token in range(3)] == [b"A", b"<0xZZ>", b"a_b"]


def test_lone_surrogates_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="character 1"):
        Tokenizer(byte_level().to_str()).encode("a\ud83d")


def test_saved_truncation_and_padding_do_not_apply() -> None:
    inner = byte_level()
    inner.enable_truncation(3)
    inner.enable_padding(length=9)
    tokenizer = Tokenizer(inner.to_str())
    assert len(tokenizer.encode("abcdef")) == 6
    assert len(tokenizer.encode("a")) == 1


def test_both_modes_in_several_threads_at_once() -> None:
    tokenizer = Tokenizer(byte_level().to_str())
    expected = {parse: tokenizer.encode("<|im_end|>", parse_special=parse) for parse in (True, False)}
    wrong: list[list[int]] = []

    def encode(parse: bool) -> None:
        for _ in range(300):
            ids = tokenizer.encode("<|im_end|>", parse_special=parse)
            if ids != expected[parse]:
                wrong.append(ids)

    threads = [threading.Thread(target=encode, args=(number % 2 == 0,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("generation", "bos", "eos"),
    [
        (None, None, ()),
        ({"eos_token_id": 262}, None, (262,)),
        ({"eos_token_id": [262, 261], "bos_token_id": 261}, 261, (262, 261)),
        ({"temperature": 0.5}, None, ()),
    ],
)
def test_from_folder(
    tmp_path: Path, generation: dict[str, object] | None, bos: int | None, eos: tuple[int, ...]
) -> None:
    (tmp_path / "tokenizer.json").write_text(byte_level().to_str(), encoding="utf-8")
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (bos, eos)
    assert tokenizer.decode(tokenizer.encode("héllo")) == "héllo"


def table(encoded: object) -> bytes:
    """A tokenizer whose normalizer is SentencePiece's table."""
    content = json.loads(byte_level().to_str())
    return json.dumps({**content, "normalizer": {"type": "Precompiled", "precompiled_charsmap": encoded}}).encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", table("/////w==")),  # 4 GiB, it says: the library would abort the process
        ("tokenizer.json", table("/////w==").replace(b"Precompiled", b"Pre\\u0063ompiled")),
        ("tokenizer.json", table("/////w==").replace(b"precompiled_", b"precompiled\\u005F")),
        ("tokenizer.json", table("/////w==").replace(b'_charsmap": ', b'_charsmap" \n:\t')),
        ("tokenizer.json", table("/////w==").replace(b'w=="', b'w==", "precompiled_charsmap": "BAAAAAAAAAA="')),
        ("tokenizer.json", table("/////w==").replace(b'"pre', b'"precompiled_charsmap": "BAAAAAAAAAA=", "pre')),
        ("tokenizer.json", table("AAAA")),
        ("tokenizer.json", table("?")),
        ("tokenizer.json", table(3)),
        ("tokenizer.json", table("").replace(b"precompiled_charsmap", b"precompiled")),  # where the library panics
        ("tokenizer.json", byte_level().to_str().replace('"!":0', '"!":4294967295').encode()),
        ("tokenizer.json", byte_level().to_str().replace('"!":0', '"!": 1000000').encode()),
        ("tokenizer.json", None),
        ("tokenizer.json", b""),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": 3}}'),
        ("generation_config.json", b"{"),
        ("generation_config.json", b"[]"),
        ("generation_config.json", b"[" * 100_000),
        ("generation_config.json", b'{"eos_token_id": "x"}'),
        ("generation_config.json", b'{"bos_token_id": [1]}'),
    ],
)
def test_damaged_folders(tmp_path: Path, name: str, content: bytes | None) -> None:
    (tmp_path / "tokenizer.json").write_text(byte_level().to_str(), encoding="utf-8")
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CorruptModel):
        Tokenizer.from_folder(tmp_path)
