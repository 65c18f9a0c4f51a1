"""The tokenizer inside a GGUF file, written as ``tokenizer.json``, and what else belongs to text.

Token ids are llama.cpp's (``src/llama-vocab.cpp``). ``tokenizer.ggml.model`` is either ``gpt2``, byte-level BPE with
the file's merges, or ``llama``, SentencePiece BPE: llama.cpp joins the neighbours whose union has the best score,
leftmost first, which is BPE with one merge for each way to split a token, ranked by the token's score. (Equal scores
of different tokens have no counterpart in a list of merges; vocabularies that SentencePiece trained have none.)

The ``tokenizer.json`` never adds a beginning-of-sequence token by itself: :attr:`TextFiles.add_bos` says whether a
plain prompt wants one, and chat templates bring their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from edge_runtime.errors import CorruptModel, UnsupportedModel
from edge_runtime.tokenizer_json import MAX_TOKEN
from exporters.checkpoint import TextFiles
from exporters.gguf_metadata import shortest
from exporters.gguf_pretokenizers import PreTokenizer, pre_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # enum llama_token_type

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""What SentencePiece writes for a space."""

ENDS = frozenset(
    {
        "<|eot_id|>",
        "<|eom_id|>",
        "<|im_end|>",
        "<|end|>",
        "<end_of_turn>",
        "<end_of_utterance>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "</s>",
        "<eos>",
        "<EOT>",
        "_<EOT>",
    }
)
"""Tokens that end an answer whatever the metadata says, known to llama.cpp by their text."""
GLM_END = "<|observation|>"
"""GLM's configurations list it among their ends, converters keep only two of the three."""

SAMPLING = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}
_TEMPLATE = "tokenizer.chat_template"
_NAMED = ("bos", "eos", "unk", "pad")

T = TypeVar("T", bool, str)


@dataclass(frozen=True)
class _Vocabulary:
    tokens: Sequence[str]
    """By id."""
    types: Sequence[float]
    ids: Mapping[str, int]


def read_text(metadata: Mapping[str, Any], vocab_size: int, where: str) -> TextFiles:
    """Everything about text in a file's metadata.

    ``vocab_size`` is that of the embedding. Raises CorruptModel if the vocabulary contradicts itself or the
    embedding, UnsupportedModel for a kind of tokenizer that is not rebuilt exactly. ``where`` is for messages.
    """
    vocabulary = _vocabulary(metadata, vocab_size, where)
    model = _typed(metadata, "tokenizer.ggml.model", "none", where)
    special: dict[str, int] = {}
    if model == "gpt2":
        pre = pre_tokenizer(_typed(metadata, "tokenizer.ggml.pre", "default", where))
        tokenizer, add_bos = _byte_level(metadata, vocabulary, pre, where), pre.add_bos
    elif model == "llama":
        special = {"unk": 0, "bos": 1, "eos": 2}  # where SentencePiece puts them
        tokenizer, add_bos = _sentencepiece(metadata, vocabulary, where), True
    else:
        raise UnsupportedModel(f"{where}: tokenizer.ggml.model {model!r} is not supported, only 'gpt2' and 'llama'")
    _add_tokens(tokenizer, vocabulary, strips_right=_strips_right(metadata))

    special |= _special_ids(metadata, vocabulary, where)
    add_bos = _typed(metadata, "tokenizer.ggml.add_bos_token", add_bos, where)
    if add_bos and "bos" not in special:
        raise CorruptModel(f"{where}: a bos token is to be added, but tokenizer.ggml.bos_token_id is missing")
    if _typed(metadata, "tokenizer.ggml.add_eos_token", False, where):
        raise UnsupportedModel(f"{where}: tokenizer.ggml.add_eos_token is true; prompts are never ended with eos here")
    template = metadata.get(_TEMPLATE)
    return TextFiles(
        tokenizer_json=tokenizer.to_str(),
        chat_template=template if isinstance(template, str) else None,
        special_tokens={
            f"{name}_token": vocabulary.tokens[special[name]]
            for name in ("bos", "eos", "unk", "pad")
            if name in special
        },
        add_bos=add_bos,
        generation=_generation(metadata, vocabulary, special),
    )


def named_templates(metadata: Mapping[str, Any]) -> list[str]:
    """Names of chat templates beside the default one, such as ``tool_use``; they are not taken over."""
    return sorted(key.removeprefix(f"{_TEMPLATE}.") for key in metadata if key.startswith(f"{_TEMPLATE}."))


def _vocabulary(metadata: Mapping[str, Any], vocab_size: int, where: str) -> _Vocabulary:
    stored = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(stored, list) or len(stored) != vocab_size:
        found = f"{len(stored)} tokens" if isinstance(stored, list) else "no list of tokens"
        raise CorruptModel(f"{where}: tokenizer.ggml.tokens has {found}, the embedding {vocab_size} rows")
    tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(stored)]  # llama.cpp's name for it
    longest = max(tokens, key=len, default="")
    if len(longest) > MAX_TOKEN:
        raise CorruptModel(
            f"{where}: tokenizer.ggml.tokens holds a token of {len(longest)} characters; the limit is {MAX_TOKEN}"
        )
    ids = {token: index for index, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        twice = next(token for index, token in enumerate(tokens) if ids[token] != index)
        raise CorruptModel(f"{where}: tokenizer.ggml.tokens holds {twice!r} twice")
    types = _numbers(metadata, "tokenizer.ggml.token_type", vocab_size, where)
    return _Vocabulary(tokens, [float(NORMAL)] * vocab_size if types is None else types, ids)


def _typed(metadata: Mapping[str, Any], key: str, default: T, where: str) -> T:
    value = metadata.get(key, default)
    if not isinstance(value, type(default)):
        raise CorruptModel(f"{where}: {key} must be a {type(default).__name__}, not {value!r}")
    return value


def _numbers(metadata: Mapping[str, Any], key: str, count: int, where: str) -> list[float] | None:
    values = metadata.get(key)
    if values is None:
        return None
    if not isinstance(values, np.ndarray) or len(values) != count or not np.isfinite(values).all():
        raise CorruptModel(f"{where}: {key} must be a list of {count} numbers")
    numbers: list[float] = values.tolist()
    return numbers


# ---- byte-level BPE


def _byte_level(metadata: Mapping[str, Any], vocabulary: _Vocabulary, pre: PreTokenizer, where: str) -> Tokenizer:
    stored = metadata.get("tokenizer.ggml.merges")
    if not isinstance(stored, list):
        raise CorruptModel(f"{where}: tokenizer.ggml.merges is missing")
    merges = list(dict.fromkeys(_split_merge(merge, vocabulary.ids, where) for merge in stored))
    tokenizer = Tokenizer(BPE(vocab=dict(vocabulary.ids), merges=merges, ignore_merges=pre.whole_words))
    splits = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in pre.expressions]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _split_merge(merge: str, ids: Mapping[str, int], where: str) -> tuple[str, str]:
    """The two halves of a merge; where a half contains spaces, the split at which all three are tokens."""
    if len(merge) > 2 * MAX_TOKEN + 1:
        raise CorruptModel(f"{where}: a merge has {len(merge)} characters; two tokens have at most {2 * MAX_TOKEN}")
    at = merge.find(" ", 1)
    while at > 0:
        left, right = merge[:at], merge[at + 1 :]
        if left in ids and right in ids and left + right in ids:
            return left, right
        at = merge.find(" ", at + 1)
    raise CorruptModel(f"{where}: the merge {merge!r} does not join two tokens to a third")


# ---- SentencePiece BPE


def _sentencepiece(metadata: Mapping[str, Any], vocabulary: _Vocabulary, where: str) -> Tokenizer:
    scores = _numbers(metadata, "tokenizer.ggml.scores", len(vocabulary.tokens), where)
    if scores is None:
        raise CorruptModel(f"{where}: tokenizer.ggml.scores is missing, without it the order of merges is unknown")
    unknown = [token for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind == UNKNOWN]
    model = BPE(
        vocab=dict(vocabulary.ids),
        merges=_merges_by_score(vocabulary, scores),
        unk_token=unknown[0] if unknown else None,
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    prefix = _typed(metadata, "tokenizer.ggml.add_space_prefix", True, where)
    # llama.cpp puts the space before a text at its start and after each special token; normalizers see the same pieces
    first = [normalizers.Prepend(SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", SPACE)])
    last = [decoders.Strip(content=" ", left=1)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *last]
    )
    return tokenizer


def _merges_by_score(vocabulary: _Vocabulary, scores: Sequence[float]) -> list[tuple[str, str]]:
    """One merge per way to split a token into two, best token first, the split with the longer left half first.

    Control, unknown, byte and user-defined tokens are never put together from pieces: they are matched whole or not
    at all.
    """
    ids = vocabulary.ids
    made = {UNKNOWN, CONTROL, USER_DEFINED, BYTE}
    targets = [index for index, kind in enumerate(vocabulary.types) if kind not in made]
    merges = []
    for index in sorted(targets, key=lambda index: -scores[index]):
        token = vocabulary.tokens[index]
        for at in range(len(token) - 1, 0, -1):
            if token[:at] in ids and token[at:] in ids:
                merges.append((token[:at], token[at:]))  # noqa: PERF401 - the condition needs both slices
    return merges


# ---- special tokens


def _add_tokens(tokenizer: Tokenizer, vocabulary: _Vocabulary, strips_right: bool) -> None:
    """Tokens that are matched in the text before anything else."""
    special, plain = [], []
    for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True):
        if kind in (CONTROL, UNKNOWN) or token in ENDS:
            # Phi-3's markers swallow the white space after them; llama.cpp knows these models by name
            strip = strips_right and token not in ("<unk>", "<s>", "<|endoftext|>")
            special.append(AddedToken(token, special=True, normalized=False, rstrip=strip))
        elif kind == USER_DEFINED:
            plain.append(AddedToken(token, special=False, normalized=False, rstrip=strips_right))
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain)


def _strips_right(metadata: Mapping[str, Any]) -> bool:
    name = str(metadata.get("general.name", "")).lower()
    return "phi-3" in name or "phi3" in name


def _special_ids(metadata: Mapping[str, Any], vocabulary: _Vocabulary, where: str) -> dict[str, int]:
    keys = {"bos": "bos", "eos": "eos", "eot": "eot", "eom": "eom", "unk": "unknown", "pad": "padding"}
    made: dict[str, int] = {}
    for name, key in keys.items():
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is None:
            continue
        if isinstance(index, int) and 0 <= index < len(vocabulary.tokens):
            made[name] = index
        elif name != "pad":  # padding is never used, and some converters write -1
            raise CorruptModel(
                f"{where}: tokenizer.ggml.{key}_token_id is {index!r}, but there are {len(vocabulary.tokens)} tokens"
            )
    return made


def _generation(metadata: Mapping[str, Any], vocabulary: _Vocabulary, special: Mapping[str, int]) -> dict[str, Any]:
    """Defaults as in generation_config.json. Samplers that it has no name for (mirostat, xtc) are left out."""
    ends = [special[name] for name in ("eos", "eot", "eom") if name in special]
    ends += [vocabulary.ids[token] for token in sorted(ENDS) if token in vocabulary.ids]
    if str(metadata.get("tokenizer.ggml.pre")) in ("glm4", "chatglm-bpe") and GLM_END in vocabulary.ids:
        ends.append(vocabulary.ids[GLM_END])
    ends = list(dict.fromkeys(ends))
    made: dict[str, Any] = {"eos_token_id": ends[0] if len(ends) == 1 else ends} if ends else {}
    made |= {f"{name}_token_id": special[name] for name in ("bos", "pad") if name in special}
    for key, name in SAMPLING.items():
        value = metadata.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool):
            made[name] = shortest(value) if isinstance(value, float) else value
    return made
