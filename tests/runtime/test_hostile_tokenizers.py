"""Tokenizers made to fill memory or to take for ever: they end with an error that says why."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest
from tokenizers import Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Inner
from tokenizers.models import BPE

from edge_runtime.errors import CorruptModel
from edge_runtime.tokenizer import Tokenizer

LETTERS = {chr(32 + index): index for index in range(95)}


def tokenizer_json(**parts: Any) -> str:
    inner = Inner(BPE(vocab=LETTERS, merges=[]))
    return json.dumps({**json.loads(inner.to_str()), **parts})


def sequence(*steps: Mapping[str, Any], key: str = "normalizers") -> dict[str, Any]:
    return {"type": "Sequence", key: list(steps)}


DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
TABLE = base64.b64encode((4).to_bytes(4, "little") + bytes(4) + b"x" * 100 + b"\0").decode()


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": sequence(*[DOUBLE] * 30)},
        {"normalizer": sequence(sequence(*[DOUBLE] * 4), sequence(*[DOUBLE] * 4))},
        {"normalizer": {**DOUBLE, "content": "a" * 1000}},
        {"normalizer": {**DOUBLE, "pattern": {"Regex": "x*"}, "content": "a" * 1000}},
        {"normalizer": {**DOUBLE, "pattern": {"String": ""}, "content": "a" * 1000}},
        {"normalizer": {"type": "Prepend", "prepend": "a" * 1000}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": TABLE}},
        {"pre_tokenizer": sequence(*[BYTES] * 12, key="pretokenizers")},
        {"normalizer": sequence(*[DOUBLE] * 4), "pre_tokenizer": sequence(*[BYTES] * 3, key="pretokenizers")},
        {"decoder": sequence(*[DOUBLE] * 30, key="decoders")},
    ],
    ids=range(10),
)
def test_texts_do_not_explode(parts: dict[str, Any]) -> None:
    with pytest.raises(CorruptModel, match=r"times as long|in the place of a character"):
        Tokenizer(tokenizer_json(**parts))


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"normalizer": sequence({"type": "Prepend", "prepend": "▁"}, {**DOUBLE, "content": "▁"})},  # Llama 2
        {"normalizer": sequence({"type": "NFC"}), "pre_tokenizer": BYTES, "decoder": BYTES},  # Qwen
        {"normalizer": sequence({"type": "NFKD"}, {**DOUBLE, "pattern": {"Regex": " {2,}"}, "content": " "})},
    ],
    ids=range(4),
)
def test_what_is_usual_passes(parts: dict[str, Any]) -> None:
    tokenizer = Tokenizer(tokenizer_json(**parts))
    assert len(tokenizer.encode("aaa")) <= 4 * 3


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
