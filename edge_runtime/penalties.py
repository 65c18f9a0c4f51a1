"""Bias and penalties: what changes logits before a token is chosen from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from edge_runtime.sampling import SamplingParams

Logits = NDArray[np.float32]
Changed = tuple[NDArray[np.int64], Logits]
"""Different tokens, and what their logits were."""
Change = Callable[[Logits, Sequence[int], int], Changed]
"""In place."""


class Adjuster:
    """What a request asks to have changed, of the few tokens that it concerns: a copy of all logits would take longer
    than the rest."""

    def __init__(self, changes: Sequence[Change]) -> None:
        self._changes = changes
        self._changed: list[Changed] = []

    def apply(self, logits: Logits, tokens: Sequence[int], prompt_length: int) -> None:
        """Change ``logits`` (vocab,), which follow on ``tokens``, until :meth:`restore`."""
        for change in self._changes:
            self._changed.append(change(logits, tokens, prompt_length))

    def restore(self, logits: Logits) -> None:
        """To the last bit."""
        while self._changed:
            ids, values = self._changed.pop()
            logits[ids] = values


def make_adjuster(params: SamplingParams, vocab_size: int) -> Adjuster | None:
    """What ``params`` ask for; None: nothing."""
    changes: list[Change] = []
    if params.logit_bias:
        changes.append(_bias(params.logit_bias))
    if params.repetition_penalty != 1.0:
        assert params.repetition_penalty is not None  # resolved
        changes.append(_repetition(params.repetition_penalty, vocab_size))
    if params.presence_penalty or params.frequency_penalty:
        changes.append(_presence_frequency(params.presence_penalty, params.frequency_penalty, vocab_size))
    return Adjuster(changes) if changes else None


def _bias(biases: Mapping[int, float]) -> Change:
    ids = np.fromiter(biases, np.int64)
    added = np.fromiter(biases.values(), np.float32)

    def change(logits: Logits, tokens: Sequence[int], prompt_length: int) -> Changed:
        values = logits[ids]
        logits[ids] = values + added
        return ids, values

    return change


def _repetition(penalty: float, vocab_size: int) -> Change:
    seen = _Seen(vocab_size)
    factor = np.float32(penalty)

    def change(logits: Logits, tokens: Sequence[int], prompt_length: int) -> Changed:
        ids, _ = seen.count(tokens)
        values = logits[ids]
        logits[ids] = np.where(values > 0, values / factor, values * factor)
        return ids, values

    return change


def _presence_frequency(presence: float, frequency: float, vocab_size: int) -> Change:
    seen = _Seen(vocab_size)

    def change(logits: Logits, tokens: Sequence[int], prompt_length: int) -> Changed:
        ids, counts = seen.count(tokens, prompt_length)
        values = logits[ids]
        logits[ids] = values - (np.float32(presence) + np.float32(frequency) * counts)
        return ids, values

    return change


class _Seen:
    """The different tokens of a growing text, which are few of a vocabulary, and how often each is in it."""

    def __init__(self, vocab_size: int) -> None:
        self._places: dict[int, int] = {}
        self._ids = np.empty(vocab_size, np.int64)
        self._counts = np.zeros(vocab_size, np.float32)
        self._read = 0

    def count(self, tokens: Sequence[int], start: int = 0) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """(ids, counts) of ``tokens`` from ``start`` on; ``tokens`` begin with those of the last call."""
        for token in tokens[max(self._read, start) :]:
            place = self._places.setdefault(token, len(self._places))
            self._ids[place] = token
            self._counts[place] += 1
        self._read = len(tokens)
        return self._ids[: len(self._places)], self._counts[: len(self._places)]
