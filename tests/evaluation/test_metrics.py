"""Figures against a plain twin: loops over tokens, with the definitions written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_runtime.evaluation.metrics import Tally, log_softmax

RANDOM = np.random.default_rng(3)


def softmax(row: NDArray[np.float32]) -> list[float]:
    largest = max(row)
    weights = [math.exp(float(value) - float(largest)) for value in row]
    return [weight / sum(weights) for weight in weights]


def top(row: NDArray[np.float32], count: int) -> list[int]:
    return sorted(range(len(row)), key=lambda token: (-row[token], token))[:count]


@pytest.mark.parametrize("vocab", [3, 7, 50])
def test_against_the_plain_twin(vocab: int) -> None:
    reference = RANDOM.standard_normal((40, vocab), np.float32) * 3
    reference[5] = 1.0  # all equal
    logits = reference + RANDOM.standard_normal((40, vocab), np.float32) * np.float32(0.3)
    following = RANDOM.integers(0, vocab, 40)
    tally = Tally()
    for start in range(0, 40, 16):
        part = slice(start, start + 16)
        tally.add(logits[part], following[part], reference[part])
    figures = tally.figures()

    nll, reference_nll, kl, top1, top5 = [], [], [], [], []
    for ours, theirs, token in zip(logits, reference, following, strict=True):
        q, p = softmax(ours), softmax(theirs)
        nll.append(-math.log(q[token]))
        reference_nll.append(-math.log(p[token]))
        kl.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
        count = min(5, vocab)
        top1.append(top(ours, 1) == top(theirs, 1))
        top5.append(len(set(top(ours, count)) & set(top(theirs, count))) / count)
    mean = [sum(each) / 40 for each in (nll, reference_nll, kl, top1, top5)]
    found = [figures.nll, figures.reference_nll, figures.kl, figures.top1, figures.top5]
    np.testing.assert_allclose(found, mean, rtol=1e-5)
    assert figures.tokens == 40
    assert figures.perplexity == pytest.approx(math.exp(mean[0]))
    assert figures.reference_perplexity == pytest.approx(math.exp(mean[1]))
    assert figures.kl_p99 == pytest.approx(float(np.quantile(kl, 0.99)), rel=1e-4)


def test_a_model_is_like_itself() -> None:
    logits = RANDOM.standard_normal((9, 30), np.float32)
    tally = Tally()
    tally.add(logits, RANDOM.integers(0, 30, 9), logits.copy())
    tally.compare([1, 2, 3], [1, 2, 3])
    figures = tally.figures()
    assert figures.kl == pytest.approx(0.0, abs=1e-12)
    assert figures.top1 == figures.top5 == 1.0
    assert figures.divergence is not None
    assert (figures.divergence.same, figures.divergence.mean) == (1, 3.0)


def test_nearly_equal_ones_do_not_look_equal() -> None:
    """Of KL that is smaller than what float32 keeps of a probability."""
    reference = RANDOM.standard_normal((200, 1000), np.float32)
    logits = reference * np.float32(1 + 1e-4)
    tally = Tally()
    tally.add(logits, np.zeros(200, np.int64), reference)
    wide, other = reference.astype(np.float64), logits.astype(np.float64)
    p = np.exp(wide - wide.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    q = np.exp(other - other.max(-1, keepdims=True))
    q /= q.sum(-1, keepdims=True)
    expected = (p * np.log(p / q)).sum(-1).mean()
    assert 0 < expected < 1e-7
    assert tally.figures().kl == pytest.approx(expected, rel=0.01)


def test_where_greedy_answers_part() -> None:
    tally = Tally()
    for answer in ([1, 2, 3, 4], [9, 2, 3, 4], [1, 2, 9, 4]):
        tally.compare(answer, [1, 2, 3, 4])
    tally.add(np.zeros((1, 2), np.float32), np.zeros(1, np.int64), np.zeros((1, 2), np.float32))
    parted = tally.figures().divergence
    assert parted is not None
    assert (parted.prompts, parted.tokens, parted.same, parted.mean) == (3, 4, 1, 2.0)


def test_texts_count_by_their_tokens() -> None:
    long, short = Tally(), Tally()
    long.add(np.zeros((30, 4), np.float32), np.zeros(30, np.int64))
    short.add(np.array([[5.0, 0, 0, 0]] * 10, np.float32), np.zeros(10, np.int64))
    both = Tally.joined([long, short]).figures()
    expected = (30 * long.figures().nll + 10 * short.figures().nll) / 40
    assert both.nll == pytest.approx(expected)
    assert both.kl is None


def test_log_softmax_of_large_numbers() -> None:
    rows = log_softmax(np.array([[1e4, -1e4, 1e4]], np.float32))
    np.testing.assert_allclose(np.exp(rows[0]), [0.5, 0, 0.5])


def test_no_divergence_is_not_less_than_none() -> None:
    """Equal distributions, whose logarithms differ in the last bit."""
    logits = np.random.default_rng(2).normal(size=(40, 64))
    tally = Tally()
    tally.add(logits, np.zeros(40, np.int64), logits + 7)
    found = tally.figures()
    assert found.kl is not None
    assert f"{found.kl:.5f} {found.kl_p99:.5f}" == "0.00000 0.00000"
