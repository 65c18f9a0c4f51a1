"""Trims a vocabulary to what some texts need. Text goes in and comes out as before: what the texts say takes the very
same tokens, and everything else shorter ones, down to single bytes."""

from __future__ import annotations

import itertools
import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from edge_runtime.errors import ConfigError, CorruptModel, UnsupportedModel
from edge_runtime.tokenizer_json import open_tokenizer
from exporters.architecture import Architecture
from exporters.checkpoint import Checkpoint, CheckpointView, TextFiles
from exporters.compression.cut import take_rows
from exporters.weights import Tensor

Json = dict[str, Any]


class TrimmedCheckpoint(CheckpointView):
    """``base`` with the tokens ``kept`` (n,) alone, which are numbered anew in their order."""

    def __init__(self, base: Checkpoint, kept: NDArray[np.intp]) -> None:
        super().__init__(base)
        self.kept = kept
        self._text = _trimmed_text(base.text, kept.tolist())

    @property
    def architecture(self) -> Architecture:
        return replace(self._base.architecture, vocab_size=len(self.kept))

    @property
    def text(self) -> TextFiles:
        return self._text

    def tensor(self, name: str) -> Tensor:
        tensor = self._base.tensor(name)
        return take_rows(tensor, self.kept) if name in ("embed", "head") else tensor


def tokens_to_keep(source: Checkpoint, texts: Iterable[str], script: str | None = None) -> NDArray[np.intp]:
    """Ids, ascending: what ``texts`` and the chat template are made of and what that is merged from, added tokens, and
    single characters or bytes. ``script`` (``latin``, ``cyrillic``, …): tokens without letters of any other, too.

    ConfigError if ``texts`` say nothing, or no token is of the script; UnsupportedModel for tokenizers other than BPE
    and Unigram; CorruptModel if a special token is none of the tokenizer's."""
    text = source.text
    tokenizer = open_tokenizer(text.tokenizer_json)
    tokenizer.no_truncation()
    content: Json = json.loads(text.tokenizer_json)
    model = content["model"]
    words = [each for each in texts if each.strip()]
    if not words and script is None:
        raise ConfigError("the text whose words the vocabulary is to keep is empty")
    for role, token in text.special_tokens.items():
        if tokenizer.token_to_id(token) is None:
            raise CorruptModel(f"{role} is {token!r}, which the tokenizer does not have")
    used = {
        token
        for each in [*words, text.chat_template or ""]
        for token in tokenizer.encode(each, add_special_tokens=False).tokens
    }
    vocabulary = _pieces(model)
    if script is not None:
        used |= _of_script(tokenizer, script)
    wide = {piece for piece in vocabulary if len(piece) == 1} if not model.get("byte_fallback") else set[str]()
    used |= wide | {piece for piece in vocabulary if len(piece) == 6 and piece.startswith("<0x")}
    used |= {model["unk_token"]} if isinstance(model.get("unk_token"), str) else set()
    if model["type"] == "BPE":
        ranks = {pair: rank for rank, pair in enumerate(_merges(model))}
        used |= {part for token in list(used) for part in _merged_from(token, ranks)}
    ids = {vocabulary[token] for token in used if token in vocabulary}
    if isinstance(model.get("unk_id"), int):
        ids.add(model["unk_id"])
    ids |= {each["id"] for each in content["added_tokens"]}
    size = source.architecture.vocab_size
    return np.array(sorted(each for each in ids if each < size), np.intp)


def _of_script(tokenizer: Tokenizer, script: str) -> set[str]:
    """Tokens whose letters are all of ``script``, by their names in Unicode. Parts of characters are left out."""
    found, some = set[str](), False
    for token, number in tokenizer.get_vocab().items():
        said = tokenizer.decode([number], skip_special_tokens=False)
        letters = [each for each in said if each.isalpha()]
        of_script = all(unicodedata.name(each, "").startswith(f"{script.upper()} ") for each in letters)
        if of_script and "\N{REPLACEMENT CHARACTER}" not in said:
            found.add(token)
            some = some or bool(letters)
    if not some:
        raise ConfigError(f"no token is of the script {script!r}; Unicode knows latin, cyrillic, greek, cjk, arabic, …")
    return found


def _pieces(model: Json) -> Mapping[str, int]:
    if model["type"] == "BPE":
        found: Mapping[str, int] = model["vocab"]
        return found
    if model["type"] == "Unigram":
        return {piece: index for index, (piece, _) in enumerate(model["vocab"])}
    raise UnsupportedModel(f"a vocabulary of the kind {model['type']} cannot be trimmed; BPE and Unigram can")


def _merges(model: Json) -> list[tuple[str, str]]:
    return [
        (first, second) for first, second in (m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"])
    ]


def _merged_from(token: str, ranks: Mapping[tuple[str, str], int]) -> Iterable[str]:
    """What byte-pair encoding makes on its way to ``token``, which it joins in the same order wherever it stands."""
    parts = list(token)
    while len(parts) > 1:
        rank, place = min((ranks.get(pair, len(ranks)), at) for at, pair in enumerate(itertools.pairwise(parts)))
        if rank == len(ranks):
            return
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
        yield parts[place]


def _trimmed_text(text: TextFiles, kept: Sequence[int]) -> TextFiles:
    new = {old: index for index, old in enumerate(kept)}
    content: Json = json.loads(text.tokenizer_json)
    model = content["model"]
    if model["type"] == "BPE":
        model["vocab"] = {piece: new[old] for piece, old in model["vocab"].items() if old in new}
        there = model["vocab"]
        pairs = [
            pair for pair in _merges(model) if pair[0] in there and pair[1] in there and pair[0] + pair[1] in there
        ]
        model["merges"] = [list(pair) for pair in pairs]
    else:
        model["vocab"] = [entry for old, entry in enumerate(model["vocab"]) if old in new]
        if isinstance(model.get("unk_id"), int):
            model["unk_id"] = new[model["unk_id"]]
    content["added_tokens"] = [{**each, "id": new[each["id"]]} for each in content["added_tokens"] if each["id"] in new]
    _renumber(content.get("post_processor"), new)
    generation = {
        name: _renumbered(value, new) if name.endswith(("token_id", "token_ids")) else value
        for name, value in text.generation.items()
    }
    made = json.dumps(content, ensure_ascii=False)
    open_tokenizer(made)  # one that could not be read again must not be written
    return replace(text, tokenizer_json=made, generation=generation)


def _renumber(processor: Json | None, new: Mapping[int, int]) -> None:
    """Ids of special tokens in a post-processor, in place."""
    for each in [processor, *(processor or {}).get("processors", [])]:
        if each is None:
            continue
        for token in (each.get("special_tokens") or {}).values():
            token["ids"] = _renumbered(token["ids"], new)
        for role in ("sep", "cls"):
            if role in each:
                each[role] = [each[role][0], new[each[role][1]]]


def _renumbered(value: Any, new: Mapping[int, int]) -> Any:
    if isinstance(value, list):
        return [new[each] for each in value if each in new]
    return new.get(value) if isinstance(value, int) else value
