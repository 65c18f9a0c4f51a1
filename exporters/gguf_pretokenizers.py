"""How ``tokenizer.ggml.pre`` splits text before byte-pair merging: llama.cpp's table in ``src/llama-vocab.cpp``.

Expressions are those of the models' own ``tokenizer.json``, which llama.cpp notes beside its adaptations for
``std::regex``. They are applied one after the other, each to the pieces that the one before left; what no
expression matches is a piece too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edge_runtime.errors import UnsupportedModel


@dataclass(frozen=True)
class PreTokenizer:
    expressions: tuple[str, ...]
    whole_words: bool = False
    """A piece that is a token is taken without merging (``ignore_merges``)."""
    add_bos: bool = False
    """What holds if the file does not say."""


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CASED = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SPACES = r"\s+(?!\S)|\s+"

_GPT2 = rf"'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|{_SPACES}"


def _llama3(digits: str) -> str:
    return (
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|{_SPACES}"
    )


def _cased(digits: str, suffix: str) -> str:
    """Words split where small letters are followed by a capital."""
    upper, lower = _CASED
    start = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{start}{upper}*{lower}+{suffix}|{start}{upper}+{lower}*{suffix}|{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|{_SPACES}"
    )


_PLAIN = PreTokenizer((_GPT2,))
_SINGLE_DIGITS = PreTokenizer((r"\p{N}", _GPT2))
_THREE_DIGITS = PreTokenizer((_llama3(r"\p{N}{1,3}"),))
_LLAMA3 = PreTokenizer((_llama3(r"\p{N}{1,3}"),), whole_words=True, add_bos=True)
_QWEN2 = PreTokenizer((_llama3(r"\p{N}"),))
_TEKKEN = PreTokenizer((_cased(r"\p{N}", ""),), whole_words=True, add_bos=True)
_GPT4O = PreTokenizer((_cased(r"\p{N}{1,3}", f"{_CONTRACTIONS}?"),))
_DEFAULT = PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))

_ROWS: tuple[tuple[PreTokenizer, str], ...] = (
    (_LLAMA3, "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2"),
    (_THREE_DIGITS, "glm4 chatglm-bpe dbrx smaug-bpe"),
    (_QWEN2, "qwen2 deepseek-r1-qwen stablelm2 hunyuan megrez kormo solar-open grok-2"),
    (_SINGLE_DIGITS, "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2"),
    (_PLAIN, "gpt-2 phi-2 mpt olmo jais trillion granite-docling gigachat a.x-4.0 mellum exaone4"),
    (_TEKKEN, "tekken"),
    (_GPT4O, "gpt-4o llama4 kanana2"),
    (_DEFAULT, "default"),
)
PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {name: row for row, names in _ROWS for name in names.split()}


def pre_tokenizer(name: str) -> PreTokenizer:
    """UnsupportedModel names a ``tokenizer.ggml.pre`` that is not in the table."""
    made = PRE_TOKENIZERS.get(name)
    if made is None:
        raise UnsupportedModel(
            f"tokenizer.ggml.pre is {name!r}: how it splits text is not known here, and a guess would give other "
            f"tokens; known are {', '.join(sorted(PRE_TOKENIZERS))}"
        )
    return made
