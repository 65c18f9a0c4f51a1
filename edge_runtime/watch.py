"""What the model's own distribution says of a prompt, and of the first tokens of an answer to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_runtime.sampling import log_sum_exp


class Confidence(NamedTuple):
    """Of one sampled token, before bias, penalties and temperature."""

    logprob: float
    margin: float
    """Of the log-probabilities of the likeliest token and the next: 0 is a tie."""


class Watch:
    """Filled by the engine's thread; may be read from others meanwhile.

    ``prompt_tokens``: of how many tokens at the prompt's end the surprise is wanted; those of them that the last step
    of the prefill computes are looked at, which costs their logits. ``tokens``: of the answer.
    """

    def __init__(self, prompt_tokens: int = 32, tokens: int = 16) -> None:
        self.prompt_tokens = prompt_tokens
        self._tokens = tokens
        self.surprise: tuple[float, ...] = ()
        """-log p of the prompt's last tokens, each given those before it."""
        self.answer: list[Confidence] = []

    def restart(self) -> None:
        """Another engine begins anew."""
        self.surprise, self.answer = (), []

    def prompt(self, logits: NDArray[np.float32], following: Sequence[int]) -> None:
        """``logits`` (n, vocab) of n tokens of the prompt, and the n tokens that came after each."""
        self.surprise = tuple(
            float(log_sum_exp(row) - row[token]) for row, token in zip(logits, following, strict=True)
        )

    def token(self, logits: NDArray[np.float32], token: int) -> None:
        """``logits`` (vocab,) that ``token`` was sampled from."""
        if len(self.answer) < self._tokens:
            second, first = np.partition(logits, -2)[-2:]
            self.answer.append(Confidence(float(logits[token] - log_sum_exp(logits)), float(first - second)))
