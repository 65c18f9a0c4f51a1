"""What speaks for or against a local answer that has begun: how sure the model was, and what it wrote."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Sequence
from difflib import SequenceMatcher

import numpy as np

from edge_runtime.watch import Confidence, Watch

_WORD = re.compile(r"\w+")


def surprise_signals(watch: Watch) -> dict[str, float]:
    """Of the prompt: the mean of -log p over its last tokens (the logarithm of its perplexity), and the worst."""
    seen = watch.surprise
    return {
        "surprise": float(np.mean(seen)) if seen else 0.0,
        "worst surprise": max(seen, default=0.0) / 10,
        "surprise known": float(bool(seen)),
    }


def confidence_signals(answer: Sequence[Confidence]) -> dict[str, float]:
    """Of the first tokens: log-probabilities and margins, their worst, and whether they fall or rise."""
    if not answer:
        return dict.fromkeys(("logprob", "worst logprob", "margin", "worst margin", "trend", "first margin"), 0.0)
    logprobs = np.array([each.logprob for each in answer])
    margins = np.minimum([each.margin for each in answer], 10.0)
    half = len(answer) // 2
    trend = float(logprobs[half:].mean() - logprobs[:half].mean()) if half else 0.0
    return {
        "logprob": float(logprobs.mean()),
        "worst logprob": float(logprobs.min()) / 4,
        "margin": float(margins.mean()) / 4,
        "worst margin": float(margins.min()),
        "first margin": float(margins[0]) / 4,
        "trend": trend,
    }


def agreement(forks: Sequence[Sequence[int]]) -> float:
    """How alike several continuations of one prompt are, 0 to 1: the mean over pairs of the share of tokens in common
    runs (Ratcliff and Obershelp, 1988). Answers that a model knows come out alike however they are drawn; see Wang et
    al., Self-Consistency, arXiv 2203.11171, and Manakul et al., SelfCheckGPT, arXiv 2303.08896."""
    ratios = [
        SequenceMatcher(None, a, b, autojunk=False).ratio() for place, a in enumerate(forks) for b in forks[place + 1 :]
    ]
    return float(np.mean(ratios)) if ratios else 1.0


def text_signals(text: str, question: str) -> dict[str, float]:
    """Of what was written: how much of it the question said already, words and numbers apart, and how much it repeats
    itself."""
    words, asked = _WORD.findall(text.lower()), set(_WORD.findall(question.lower()))
    numbers = [word for word in words if word.isdigit()]
    data = text.encode()
    return {
        "from the question": _share(words, asked),
        "numbers from the question": _share(numbers, asked) if numbers else 0.5,
        "new numbers": math.log1p(sum(number not in asked for number in numbers)),
        "compressed": len(zlib.compress(data, 1)) / max(len(data), 1) if len(data) > 40 else 1.0,
        "written": math.log1p(len(words)),
    }


def _share(words: Sequence[str], of: set[str]) -> float:
    return sum(word in of for word in words) / len(words) if words else 0.0
