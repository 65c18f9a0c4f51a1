"""A model beside its reference, on texts: perplexity, divergence and agreement, as llama.cpp's ``perplexity
--kl-divergence`` measures them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import ConfigError
from edge_runtime.evaluation.metrics import Figures, Tally
from edge_runtime.evaluation.subject import Subject

WINDOW = 1024
"""Tokens that are looked at together, each given those before it in its window."""
PROMPT_TOKENS, ANSWER_TOKENS = 48, 48
"""Of greedy answers: what begins a piece of text, and what is made of it."""
PROMPTS = 6
"""Of each text."""
Progress = Callable[[str, int, int], None]
"""``progress(text, done, total)`` in tokens."""


class Evaluation(msgspec.Struct, frozen=True, omit_defaults=True):
    """Of one model."""

    model: str
    overall: Figures
    texts: dict[str, Figures]
    reference: str | None = None


def evaluate(
    model: Subject, reference: Subject | None, texts: Mapping[str, str], progress: Progress | None = None
) -> Evaluation:
    """ConfigError if the two do not speak of the same tokens, or a text is too short to say anything."""
    if reference is not None:
        _check_vocabularies(model, reference)
    tallies = {name: _tally(model, reference, name, text, progress) for name, text in texts.items()}
    return Evaluation(
        model=model.name,
        overall=Tally.joined(tallies.values()).figures(),
        texts={name: tally.figures() for name, tally in tallies.items()},
        reference=None if reference is None else reference.name,
    )


def _check_vocabularies(model: Subject, reference: Subject) -> None:
    ours, theirs = model.vocabulary, reference.vocabulary
    if ours != theirs:
        place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
        what = (
            f"{len(ours)} and {len(theirs)} tokens"
            if place is None
            else f"token {place} is {ours[place]!r} for one and {theirs[place]!r} for the other"
        )
        raise ConfigError(
            f"{model.placement.package.name} and {reference.placement.package.name} have different vocabularies "
            f"({what}): their predictions cannot be compared; leave --reference out for the perplexity alone"
        )


def _tally(model: Subject, reference: Subject | None, name: str, text: str, progress: Progress | None) -> Tally:
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
            tally.compare(model.greedy(prompt, count), reference.greedy(prompt, count))
    return tally


def _score(tally: Tally, model: Subject, reference: Subject | None, ids: NDArray[np.int64]) -> None:
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
