"""What is measured of a model beside its reference, from the logits of both after the same tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float32]
"""Logits (n, vocab) after n tokens."""


class Divergence(msgspec.Struct, frozen=True):
    """Of greedy answers: after how many tokens they part."""

    prompts: int
    tokens: int
    """Of each answer."""
    same: int
    """Answers that are the same to the end."""
    mean: float
    """Tokens that are the same before the first other one; all of them where the answers are the same."""


class Figures(msgspec.Struct, frozen=True, omit_defaults=True):
    """Of one text, or all. Without a reference only the first three are there."""

    tokens: int
    """Scored: all but the first of each window."""
    nll: float
    """Mean negative log-likelihood, nats a token."""
    perplexity: float
    """exp(nll)."""
    reference_nll: float | None = None
    reference_perplexity: float | None = None
    kl: float | None = None
    """Mean Kullback–Leibler divergence of the model's next-token distribution from the reference's, D(reference ‖
    model), nats a token."""
    kl_p99: float | None = None
    """Its 99th percentile over tokens."""
    top1: float | None = None
    """Share of tokens after which both think the same one the likeliest."""
    top5: float | None = None
    """Mean share of the reference's five likeliest that are among the model's five."""
    divergence: Divergence | None = None


@dataclass
class Tally:
    """Sums over the tokens of a text."""

    nll: list[NDArray[np.floating]] = field(default_factory=list)
    reference_nll: list[NDArray[np.floating]] = field(default_factory=list)
    kl: list[NDArray[np.floating]] = field(default_factory=list)
    top1: list[NDArray[np.floating]] = field(default_factory=list)
    top5: list[NDArray[np.floating]] = field(default_factory=list)
    shared: list[int] = field(default_factory=list)
    """Of each greedy answer, tokens that are the same at its beginning."""
    answer_tokens: int = 0

    def add(self, logits: Rows, following: NDArray[np.int64], reference: Rows | None = None) -> None:
        """``logits`` (n, vocab) after n tokens, and the n tokens that follow each."""
        own = log_softmax(logits)
        places = np.arange(len(following))
        self.nll.append(-own[places, following])
        if reference is None:
            return
        theirs = log_softmax(reference)
        self.reference_nll.append(-theirs[places, following])
        self.kl.append(np.maximum((np.exp(theirs) * (theirs - own)).sum(-1), 0.0))  # rounding may leave less
        ours5, theirs5 = _top(logits, 5), _top(reference, 5)
        self.top1.append((ours5[:, 0] == theirs5[:, 0]).astype(np.float32))
        self.top5.append((ours5[:, :, None] == theirs5[:, None, :]).any(-1).mean(-1).astype(np.float32))

    def compare(self, answer: Sequence[int], reference: Sequence[int]) -> None:
        """Greedy answers to the same prompt."""
        pairs = zip(answer, reference, strict=True)
        self.shared.append(next((place for place, (a, b) in enumerate(pairs) if a != b), len(reference)))
        self.answer_tokens = len(reference)

    @classmethod
    def joined(cls, tallies: Iterable[Tally]) -> Tally:
        whole = cls()
        for each in tallies:
            for name in ("nll", "reference_nll", "kl", "top1", "top5", "shared"):
                getattr(whole, name).extend(getattr(each, name))
            whole.answer_tokens = max(whole.answer_tokens, each.answer_tokens)
        return whole

    def summary(self) -> dict[str, float]:
        """What a reference is needed for."""
        figures = msgspec.to_builtins(self.figures())
        return {name: value for name, value in figures.items() if isinstance(value, float)}

    def figures(self) -> Figures:
        nll = np.concatenate(self.nll).astype(np.float64)
        figures = Figures(len(nll), float(nll.mean()), math.exp(nll.mean()))
        if not self.kl:
            return figures
        reference, kl = (float(np.concatenate(each).mean(dtype=np.float64)) for each in (self.reference_nll, self.kl))
        shared = self.shared
        same = sum(count == self.answer_tokens for count in shared)
        return msgspec.structs.replace(
            figures,
            reference_nll=reference,
            reference_perplexity=math.exp(reference),
            kl=kl,
            kl_p99=float(np.quantile(np.concatenate(self.kl), 0.99)),
            top1=float(np.concatenate(self.top1).mean(dtype=np.float64)),
            top5=float(np.concatenate(self.top5).mean(dtype=np.float64)),
            divergence=Divergence(len(shared), self.answer_tokens, same, sum(shared) / len(shared)) if shared else None,
        )


def log_softmax(logits: Rows) -> NDArray[np.float64]:
    """Over the last axis, in float64: differences of nearly equal distributions are small."""
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(-1, keepdims=True))
    return wide


def _top(logits: Rows, count: int) -> NDArray[np.intp]:
    """(n, count) ids of the likeliest, best first; of equal ones the lower id."""
    count = min(count, logits.shape[-1])
    found = np.sort(np.argpartition(-logits, count - 1, axis=-1)[:, :count], axis=-1)
    order = np.argsort(-np.take_along_axis(logits, found, -1), axis=-1, kind="stable")
    return np.take_along_axis(found, order, -1)
