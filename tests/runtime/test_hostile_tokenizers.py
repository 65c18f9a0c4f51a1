"""Tokenizers made to fill memory or to take for ever: they end with an error that says why."""

from __future__ import annotations

import base64
import json
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from tokenizers import Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Inner
from tokenizers.models import BPE

from edge_runtime.errors import CorruptModel, InvalidRequest
from edge_runtime.tokenizer import Tokenizer
from edge_runtime.tokenizer_json import MAX_TOKEN, _long_strings

LETTERS = {chr(32 + index): index for index in range(95)}


def tokenizer_json(**parts: Any) -> str:
    inner = Inner(BPE(vocab=LETTERS, merges=[]))
    return json.dumps({**json.loads(inner.to_str()), **parts})


def sequence(*steps: Mapping[str, Any], key: str = "normalizers") -> dict[str, Any]:
    return {"type": "Sequence", key: list(steps)}


DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
CHINESE = {
    "type": "BertNormalizer",
    "clean_text": True,
    "handle_chinese_chars": True,
    "strip_accents": None,
    "lowercase": True,
}
EACH = {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False}
ONE_FOR_MANY: dict[str, Any] = {**DOUBLE, "pattern": {"String": "ل"}, "content": "ﷺ"}
A = {"Sequence": {"id": "A", "type_id": 0}}
B = {"Sequence": {"id": "B", "type_id": 0}}


def table(piece: bytes) -> dict[str, Any]:
    data = (1024).to_bytes(4, "little") + bytes(1024) + piece + b"\0"
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}


def metaspace(replacement: str = "▁", scheme: str = "always") -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": replacement, "prepend_scheme": scheme, "split": True}


def template(*pieces: Mapping[str, Any], ids: int = 1) -> dict[str, Any]:
    special = {"[SEP]": {"id": "[SEP]", "ids": [3] * ids, "tokens": ["#"] * ids}}
    return {"type": "TemplateProcessing", "single": list(pieces), "pair": [A, B], "special_tokens": special}


SEP = {"SpecialToken": {"id": "[SEP]", "type_id": 0}}
MADE_LONGER: dict[str, dict[str, Any]] = {
    "doubled thirty times": {"normalizer": sequence(*[DOUBLE] * 30)},
    "sequences in a sequence": {"normalizer": sequence(sequence(*[DOUBLE] * 4), sequence(*[DOUBLE] * 4))},
    "a long replacement": {"normalizer": {**DOUBLE, "content": "a" * 1000}},
    "of what may be nothing": {"normalizer": {**DOUBLE, "pattern": {"Regex": "x*"}, "content": "a" * 64}},
    "of nothing": {"normalizer": {**DOUBLE, "pattern": {"String": ""}, "content": "a" * 64}},
    "put before": {"normalizer": {"type": "Prepend", "prepend": "a" * 1000}},
    "a table with a long piece": {"normalizer": table(b"x" * 100)},
    "a table with a shorter piece": {"normalizer": sequence(table(b"x" * 43), *[DOUBLE] * 2)},
    "spaces around Chinese": {"normalizer": sequence(*[CHINESE] * 500)},
    "a letter that is three words": {"normalizer": sequence(*[ONE_FOR_MANY, {"type": "NFKD"}] * 3)},
    "bytes of bytes": {"pre_tokenizer": sequence(*[BYTES] * 12, key="pretokenizers")},
    "split and put before": {
        "pre_tokenizer": sequence(*[EACH, metaspace(), EACH, metaspace("@", "first")] * 6, key="pretokenizers")
    },
    "both": {"normalizer": sequence(*[DOUBLE] * 4), "pre_tokenizer": sequence(*[BYTES] * 3, key="pretokenizers")},
    "the text 2000 times": {"post_processor": template(*[A] * 2000)},
    "the text again and again": {"post_processor": sequence(*[template(A, A)] * 8, key="processors")},
    "much around the text": {"post_processor": template(A, *[SEP] * 100, ids=100)},
    "a replacement in the answer": {"decoder": sequence(*[DOUBLE] * 30, key="decoders")},
    "spaces in the answer": {"decoder": sequence(*[{"type": "BPEDecoder", "suffix": ""}] * 20, key="decoders")},
    "more spaces in the answer": {
        "decoder": sequence(
            *[{"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True}] * 20, key="decoders"
        )
    },
    "a long token": {"model": {"type": "WordLevel", "vocab": {"a" * 1025: 0, "b": 1}, "unk_token": "b"}},
    "a long token of quotes": {"model": {"type": "WordLevel", "vocab": {'"' * 1025: 0, "b": 1}, "unk_token": "b"}},
    "one behind a backslash": {
        "model": {"type": "WordLevel", "vocab": {"\\": 0, "\\" * 1025: 1, "b": 2}, "unk_token": "b"}
    },
    "one that is added": {
        "added_tokens": [
            {"id": 95, "content": "é" * 1025, **dict.fromkeys(("single_word", "lstrip", "rstrip"), False)}
            | dict.fromkeys(("normalized", "special"), True)
        ]
    },
}


@pytest.mark.parametrize("what", MADE_LONGER)
def test_texts_do_not_explode(what: str) -> None:
    found = r"times as long|in the place of a character|around a text|a token has 1025 characters"
    with pytest.raises(CorruptModel, match=found):
        Tokenizer(tokenizer_json(**MADE_LONGER[what]))


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"normalizer": sequence({"type": "Prepend", "prepend": "▁"}, {**DOUBLE, "content": "▁"})},  # Llama 2
        {"normalizer": sequence({"type": "NFC"}), "pre_tokenizer": BYTES, "decoder": BYTES},  # Qwen
        {"normalizer": sequence({"type": "NFKD"}, {**DOUBLE, "pattern": {"Regex": " {2,}"}, "content": " "})},
        {  # XLM-RoBERTa
            "normalizer": sequence(table("ﷺ".encode()), {**DOUBLE, "pattern": {"Regex": " {2,}"}, "content": " "}),
            "pre_tokenizer": sequence({"type": "WhitespaceSplit"}, metaspace(), key="pretokenizers"),
            "post_processor": template(SEP, A, SEP, SEP),
        },
        {"normalizer": CHINESE, "pre_tokenizer": {"type": "BertPreTokenizer"}, "post_processor": template(SEP, A, SEP)},
        {"pre_tokenizer": {**BYTES, "add_prefix_space": True}, "post_processor": template(A, A)},
        {"pre_tokenizer": sequence(*[metaspace(scheme="never")] * 9, key="pretokenizers"), "decoder": metaspace()},
        {"model": {"type": "WordLevel", "vocab": {"a" * 1024: 0, "aaa": 1}, "unk_token": "aaa"}},
        {"model": {"type": "WordLevel", "vocab": {"é" * 1024: 0, "aaa": 1}, "unk_token": "aaa"}},  # spelled as escapes
        {"normalizer": {**DOUBLE, "pattern": {"Regex": "x" * 5000}, "content": "y"}},  # long, and no token
    ],
    ids=range(11),
)
def test_what_is_usual_passes(parts: dict[str, Any]) -> None:
    tokenizer = Tokenizer(tokenizer_json(**parts))
    assert len(tokenizer.encode("aaa")) <= 4 * 3


def test_every_long_string_is_found() -> None:
    rng = random.Random(1)

    def value(depth: int) -> Any:
        if depth == 0 or rng.random() < 0.4:
            pieces = ("a", "\\", '"', "\\" * 300, '"' * 300, "é" * 300, "\n" * 300, ":" * 300, "\u2028" * 300)
            return "".join(rng.choices(pieces, k=rng.randrange(7)))
        if rng.random() < 0.3:
            return [value(depth - 1) for _ in range(3)]
        return {value(0): value(depth - 1) for _ in range(3)}

    many = 0
    for _ in range(200):
        text = json.dumps(value(4), ensure_ascii=rng.random() < 0.5, indent=rng.choice((None, 1, 2000)))
        found = set(_long_strings(text))
        long = {each for each in _strings(json.loads(text)) if len(each) > MAX_TOKEN}
        assert long <= found
        many += len(long)
    assert many > 100


def _strings(value: Any) -> Iterator[str]:
    for each in [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _strings(each)
    if isinstance(value, str):
        yield value


def test_the_growth_that_is_counted_is_the_librarys() -> None:
    """Seven doublings are what may be, and the library makes of them what was counted."""
    normalizer = normalizers.Sequence([normalizers.Replace("a", "aa")] * 7)
    inner = Inner(BPE(vocab=LETTERS, merges=[]))
    inner.normalizer = normalizer
    assert len(Tokenizer(inner.to_str()).encode("aa")) == 2 * 128
    inner.normalizer = normalizers.Sequence([normalizers.Replace("a", "aa")] * 8)
    with pytest.raises(CorruptModel, match="128 times"):
        Tokenizer(inner.to_str())


@pytest.mark.parametrize("text", ["[" * 100_000, "{", '{"normalizer": ' * 5000])
def test_what_is_no_json_is_an_error(text: str) -> None:
    with pytest.raises(CorruptModel):
        Tokenizer(text)


def test_a_pattern_that_takes_for_ever_is_an_error_and_the_next_text_passes() -> None:
    """In a process of its own, because the library also writes its panic to stderr."""
    inner = Inner(BPE(vocab=LETTERS, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"(a+)+$"), "isolated")
    code = """
import sys
from edge_runtime.errors import InvalidRequest
from edge_runtime.tokenizer import Tokenizer
tokenizer = Tokenizer(sys.stdin.read())
for ask in (tokenizer.encode, tokenizer.encode_framed):
    try:
        ask("a" * 40 + "b")
    except InvalidRequest as error:
        print(error)
print(len(tokenizer.encode("aaab")))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], input=inner.to_str(), capture_output=True, text=True, timeout=60, check=True
    )
    first, second, last = done.stdout.splitlines()
    assert first == second
    assert "fails on this text" in first
    assert last == "4"


def test_an_interrupt_is_no_panic() -> None:
    tokenizer = Tokenizer(tokenizer_json())

    class Interrupted:
        def encode(self, *given: object, **named: object) -> None:
            raise KeyboardInterrupt

    tokenizer._inner = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        tokenizer.encode("a")


def test_what_a_library_raises_while_it_decodes_is_an_error_of_the_request() -> None:
    tokenizer = Tokenizer(tokenizer_json())

    class Failing:
        def decode(self, *given: object, **named: object) -> None:
            raise Exception("no such thing")

    assert tokenizer.decode([65]) == "a"
    tokenizer._inner = Failing()
    with pytest.raises(InvalidRequest, match="fails on this text: no such thing"):
        tokenizer.decode([65])
