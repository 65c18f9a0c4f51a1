"""Bias and penalties: what changes logits before a token is chosen from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from edge_runtime.sampling import SamplingParams

Logits = NDArray[np.float32]
Adjust = Callable[[Logits, Sequence[int], int], Logits]
Change = Callable[[Logits, Sequence[int], int], None]
"""In place."""


def make_adjuster(params: SamplingParams, vocab_size: int) -> Adjust | None:
    """What ``params`` ask for, in one function of the logits, all tokens and the prompt's length; None: nothing.

    The array that it returns is its own, and changes at the next call.
    """
    steps: list[Change] = []
    if params.logit_bias:
        steps.append(_bias(params.logit_bias))
    if params.repetition_penalty != 1.0:
        assert params.repetition_penalty is not None  # resolved
        steps.append(_repetition(params.repetition_penalty, vocab_size))
    if params.presence_penalty or params.frequency_penalty:
        steps.append(_presence_frequency(params.presence_penalty, params.frequency_penalty, vocab_size))
    if not steps:
        return None
    adjusted = np.empty(vocab_size, np.float32)  # kept: the pages of a new one cost more than the copy

    def adjust(logits: Logits, tokens: Sequence[int], prompt_length: int) -> Logits:
        adjusted[:] = logits
        for step in steps:
            step(adjusted, tokens, prompt_length)
        return adjusted

    return adjust


def _bias(biases: Mapping[int, float]) -> Change:
    ids = np.fromiter(biases, np.int64)
    values = np.fromiter(biases.values(), np.float32)

    def change(logits: Logits, tokens: Sequence[int], prompt_length: int) -> None:
        logits[ids] += values

    return change


def _repetition(penalty: float, vocab_size: int) -> Change:
    seen = _Seen(vocab_size)
    factor = np.float32(penalty)

    def change(logits: Logits, tokens: Sequence[int], prompt_length: int) -> None:
        ids, _ = seen.count(tokens)
        values = logits[ids]
        logits[ids] = np.where(values > 0, values / factor, values * factor)

    return change


def _presence_frequency(presence: float, frequency: float, vocab_size: int) -> Change:
    seen = _Seen(vocab_size)

    def change(logits: Logits, tokens: Sequence[int], prompt_length: int) -> None:
        ids, counts = seen.count(tokens, prompt_length)
        logits[ids] -= np.float32(presence) + np.float32(frequency) * counts

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
