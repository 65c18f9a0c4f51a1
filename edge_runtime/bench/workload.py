"""Synthetic load, the same for the same seed: prompts that share nothing, and arrivals."""

from __future__ import annotations

import re
from functools import cache
from importlib import resources

import numpy as np

COPY_CHARACTERS = 700
"""Of the text that is to be repeated."""


def bundled_text() -> str:
    """A page of English: the text to score, and where words of prompts come from."""
    return resources.files("edge_runtime.bench").joinpath("text.txt").read_text(encoding="utf-8")


def random_tokens(rng: np.random.Generator, count: int, vocab_size: int) -> list[int]:
    """``count`` token ids, each as likely as any other: no two prompts share a prefix worth caching."""
    tokens: list[int] = rng.integers(0, vocab_size, count).tolist()
    return tokens


def random_words(rng: np.random.Generator, count: int) -> str:
    """``count`` English words in random order, for servers that are asked in text."""
    return " ".join(rng.choice(_words(), count).tolist())


def poisson_arrivals(rng: np.random.Generator, rate: float, count: int) -> list[float]:
    """When ``count`` requests arrive, in seconds from the start: ``rate`` a second on average, each independent."""
    arrivals: list[float] = np.cumsum(rng.exponential(1 / rate, count)).tolist()
    return arrivals


def copy_tasks() -> dict[str, str]:
    """What an answer to it repeats: a text to repeat, one to correct, and facts to pull out of sentences."""
    text = " ".join(bundled_text().split())
    text = text[: text.rindex(".", 0, COPY_CHARACTERS) + 1]
    people = (
        ("Anna Keller", "teacher", "Hamburg"),
        ("Brian Walsh", "engineer", "Dublin"),
        ("Carla Rossi", "nurse", "Bologna"),
        ("David Novak", "driver", "Prague"),
        ("Elena Petrova", "lawyer", "Sofia"),
        ("Frank Dubois", "baker", "Lyon"),
    )
    sentences = "\n".join(f"{name} works as a {work} and lives in {city}." for name, work, city in people)
    return {
        "repeat": f"Repeat this text word for word, without any change:\n\n{text}",
        "correct": f"Correct the spelling mistakes in this text and change nothing else:\n\n{text}",
        "extract": f'Extract the city of every person as a list, one "name: city" per line.\n\n{sentences}',
    }


@cache
def _words() -> tuple[str, ...]:
    return tuple(sorted(set(re.findall(r"[a-z]{3,}", bundled_text()))))
