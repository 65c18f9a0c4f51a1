"""The same seed gives the same load; another seed another."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.bench.workload import bundled_text, poisson_arrivals, random_tokens, random_words

ROOT = Path(__file__).parents[2]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_seeded() -> None:
    assert random_tokens(rng(), 50, 1000) == random_tokens(rng(), 50, 1000) != random_tokens(rng(1), 50, 1000)
    assert random_words(rng(), 50) == random_words(rng(), 50) != random_words(rng(1), 50)
    assert poisson_arrivals(rng(), 2, 50) == poisson_arrivals(rng(), 2, 50) != poisson_arrivals(rng(1), 2, 50)


def test_seeded_across_processes() -> None:
    """Words come out of a set, whose order differs between processes."""
    code = (
        "import numpy as np; from edge_runtime.bench.workload import random_words;"
        "print(random_words(np.random.default_rng(0), 30), end='')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == random_words(rng(), 30)


def test_tokens_are_in_the_vocabulary_and_use_all_of_it() -> None:
    assert set(random_tokens(rng(), 1000, 16)) == set(range(16))


def test_prompts_differ() -> None:
    generator = rng()
    first, second = (random_tokens(generator, 64, 1000) for _ in range(2))
    assert first[:8] != second[:8]


def test_words() -> None:
    text = random_words(rng(), 200)
    assert len(text.split()) == 200
    assert len(set(text.split())) > 100


@pytest.mark.parametrize("rate", [0.5, 20.0])
def test_arrivals_are_a_poisson_process(rate: float) -> None:
    arrivals = np.array(poisson_arrivals(rng(), rate, 20_000))
    gaps = np.diff(arrivals, prepend=0.0)
    assert (gaps > 0).all()
    assert gaps.mean() == pytest.approx(1 / rate, rel=0.05)
    assert gaps.std() == pytest.approx(1 / rate, rel=0.05)  # as large as the mean: exponential
    counts = np.bincount(np.floor(arrivals * rate).astype(int))[:-1]
    assert counts.var() == pytest.approx(counts.mean(), rel=0.05)


def test_the_bundled_text_is_the_one_of_the_references() -> None:
    assert bundled_text() == (ROOT / "tests/fixtures/smollm2/text.txt").read_text(encoding="utf-8")
