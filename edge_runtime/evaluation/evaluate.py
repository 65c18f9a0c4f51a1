"""A model beside its reference, on texts: perplexity, divergence and agreement, as llama.cpp's ``perplexity
--kl-divergence`` measures them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import ConfigError
from edge_runtime.evaluation.metrics import Figures, Tally
from edge_runtime.tokenizer import Tokenizer

WINDOW = 1024
"""Tokens that are looked at together, each given those before it in its window."""
PROMPT_TOKENS, ANSWER_TOKENS = 48, 48
"""Of greedy answers: what begins a piece of text, and what is made of it."""
PROMPTS = 6
"""Of each text."""
Progress = Callable[[str, int, int], None]
"""``progress(text, done, total)`` in tokens."""


class Model(Protocol):
    """What is evaluated, as :class:`edge_runtime.evaluation.subject.Subject`."""

    tokenizer: Tokenizer

    @property
    def name(self) -> str: ...

    @property
    def vocabulary(self) -> Sequence[str | None]:
        """Of each id the token."""

    @property
    def longest(self) -> int:
        """Tokens of a text that it can look at."""

    @property
    def chunk(self) -> int:
        """Tokens that it looks at in one step, at most."""

    def logits(self, ids: NDArray[np.int64], step: int) -> Iterator[NDArray[np.float32]]:
        """After ``step`` tokens of ``ids`` at a time, (step, vocab); each holds until the next is asked for."""

    def greedy(self, prompt: NDArray[np.int64], count: int) -> list[int]:
        """The ``count`` tokens that it thinks the likeliest, one after the other, whatever they are."""


class Evaluation(msgspec.Struct, frozen=True, omit_defaults=True):
    """Of one model."""

    model: str
    overall: Figures
    texts: dict[str, Figures]
    reference: str | None = None


def evaluate(
    model: Model, reference: Model | None, texts: Mapping[str, str], progress: Progress | None = None
) -> Evaluation:
    """ConfigError if the reference does not know the model's tokens, or a text is too short to say anything.

    Texts are read in the model's tokens. Of a reference that has more of them the others are left out.
    """
    other = None if reference is None else _Reference(reference, _common_tokens(model, reference))
    tallies = {name: _tally(model, other, name, text, progress) for name, text in texts.items()}
    return Evaluation(
        model=model.name,
        overall=Tally.joined(tallies.values()).figures(),
        texts={name: tally.figures() for name, tally in tallies.items()},
        reference=None if reference is None else reference.name,
    )


def _common_tokens(model: Model, reference: Model) -> NDArray[np.int64] | None:
    """What each of the model's tokens is to the reference; None: the same. A trimmed model has fewer, with numbers of
    their own."""
    ours, theirs = model.vocabulary, reference.vocabulary
    if ours == theirs:
        return None
    places = {token: place for place, token in enumerate(theirs)}
    found = [places.get(token) for token in ours]
    known = [place for place in found if place is not None]
    if len(known) < len(found):
        lost = found.index(None)
        raise ConfigError(
            f"{model.name} and {reference.name} have different vocabularies "
            f"({len(ours)} and {len(theirs)} tokens; the reference lacks {ours[lost]!r}): their predictions cannot be "
            "compared; leave --reference out for the perplexity alone"
        )
    return np.array(known, np.int64)


class _Reference:
    """The reference, asked and heard in the model's tokens."""

    def __init__(self, subject: Model, common: NDArray[np.int64] | None) -> None:
        self._subject = subject
        self._common = common
        self.longest, self.chunk = subject.longest, subject.chunk

    def theirs(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        return ids if self._common is None else self._common[ids]

    def logits(self, ids: NDArray[np.int64], step: int) -> Iterator[NDArray[np.float32]]:
        for rows in self._subject.logits(self.theirs(ids), step):
            yield rows if self._common is None else rows[:, self._common]

    def greedy(self, prompt: NDArray[np.int64], count: int) -> list[int]:
        """In its own tokens."""
        return self._subject.greedy(self.theirs(prompt), count)


def _tally(model: Model, reference: _Reference | None, name: str, text: str, progress: Progress | None) -> Tally:
    ids = np.array(model.tokenizer.encode(text), np.int64)
    window = min([WINDOW, model.longest, *([] if reference is None else [reference.longest])])
    if len(ids) < 2:
        raise ConfigError(f"the text {name} has {len(ids)} tokens, and needs two: the first cannot be predicted")
    tally = Tally()
    for start in range(0, len(ids) - 1, window):
        part = ids[start : start + window]
        if len(part) > 1:
            _score(tally, model, reference, part)
        if progress is not None:
            progress(name, min(start + window, len(ids)), len(ids))
    if reference is not None:
        for prompt in _prompts(ids, min(PROMPT_TOKENS, window // 2)):
            count = min(ANSWER_TOKENS, window - len(prompt))
            answer = np.array(model.greedy(prompt, count), np.int64)
            tally.compare(reference.theirs(answer).tolist(), reference.greedy(prompt, count))
    return tally


def _score(tally: Tally, model: Model, reference: _Reference | None, ids: NDArray[np.int64]) -> None:
    """Step by step, so that the logits of one are in memory and no more."""
    step = model.chunk if reference is None else min(model.chunk, reference.chunk)
    ours = model.logits(ids, step)
    theirs = itertools.repeat(None) if reference is None else reference.logits(ids, step)
    for start, rows, others in zip(range(0, len(ids), step), ours, theirs, strict=False):
        following = ids[start + 1 : start + 1 + step]
        count = len(following)
        if others is None:
            tally.add(rows[:count], following)
        else:
            size = min(rows.shape[1], others.shape[1])  # padding of the vocabulary may differ
            tally.add(rows[:count, :size], following, others[:count, :size])


def _prompts(ids: NDArray[np.int64], length: int) -> list[NDArray[np.int64]]:
    """Spread over the text."""
    room = len(ids) - length
    if room < 0 or length < 1:
        return []
    starts = sorted({round(place) for place in np.linspace(0, room, PROMPTS)})
    return [ids[start : start + length] for start in starts]
