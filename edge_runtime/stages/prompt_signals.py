"""What speaks for or against a small model's answer: from the text of a request, before anything has run.

Every signal is a number, larger or smaller without bounds or a share of 0 to 1; which way it counts is for the
calibration to say. Together they take a fraction of a millisecond: the text is cut into words once, and of long texts
only the ends are looked at.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import NamedTuple

from edge_runtime.facts import Facts

MOST = 1200
"""Characters of a text that are looked at: half at its beginning, half at its end."""

_WORD = re.compile(r"\w+")
_PART = re.compile(r"[.!?:;]\s+|\n+")
_SUM = re.compile(r"\d ?[-+*/×÷^=<>] ?\d")


class _Terms(NamedTuple):
    words: frozenset[str]
    phrases: tuple[str, ...]


def _terms(text: str) -> _Terms:
    """Words and phrases, parted by commas."""
    terms = [each.strip() for each in text.split(",")]
    return _Terms(frozenset(terms), tuple(f" {term} " for term in terms if " " in term))


_OPERATORS = _terms("plus, minus, times, divided by, percent, sum, difference, product, total")
_COUNTING = _terms(
    "calculate, compute, how many, in total, solve, double, half, add, subtract, multiply, divide, result"
)
_ORDER = _terms(
    "sort, order, rank, largest, smallest, longest, biggest, maximum, alphabetical, ascending, descending, compare"
)
_COPY = _terms("repeat, copy, exactly, again, verbatim, same words, quote")
_FIND = _terms("what, which, who, where, when, find, extract, name")
_STEPS = _terms("then, after that, first, next, finally, step, steps, therefore, if, unless")
_WHY = _terms("why, explain, prove, derive, analyse, analyze, evaluate, design, plan, discuss")
_CONSTRAINTS = _terms("must, only, exactly, at least, at most, no more, without, never, always, not, each, every, all")
_WRITE = _terms("write, translate, summarise, summarize, rewrite, essay, poem, story, list, table")
_CODE = _terms("def, class, function, import, return, python, javascript, sql, regex, code, bug")
_MATHS = _terms("integral, derivative, equation, theorem, probability, matrix, frac, sqrt")
_SYMBOLS = "∑∫√π≤≥≠"


class PromptSignals:
    """A stage."""

    def signals(self, facts: Facts) -> dict[str, float]:
        """Of the last question of the user and the conversation before it."""
        text = _ends(facts.question)
        words = _WORD.findall(text.lower())
        there = Counter(words)
        line = f" {' '.join(words)} "
        numbers = [word for word in there if word.isdigit()]
        *told, asks = _PART.split(text.strip())
        language = facts.language

        def count(terms: _Terms) -> int:
            found = sum(there[word] for word in terms.words & there.keys())
            return found + sum(line.count(phrase) for phrase in terms.phrases)

        operators = count(_OPERATORS) + len(_SUM.findall(text))
        counting = count(_COUNTING)
        return {
            "tokens": math.log1p(facts.tokens),
            "words": math.log1p(len(words)),
            "sentences": math.log1p(len(told)),
            "lines": math.log1p(text.count("\n") + 1),
            "turns": math.log1p(max(0, len(facts.messages) - 1)),
            "history": math.log1p(len(facts.history)),
            "numbers": math.log1p(sum(there[number] for number in numbers)),
            "digits": max(map(len, numbers), default=0) / 4,
            "commas": math.log1p(text.count(",")),
            "questions": float(text.count("?")),
            "computes": float(len(numbers) > 1 and operators + counting > 0),
            "operators": math.log1p(operators),
            "counting": math.log1p(counting),
            "order": float(count(_ORDER) > 0),
            "copy": float(count(_COPY) > 0),
            "find": float(count(_FIND) > 0),
            "steps": math.log1p(count(_STEPS)),
            "why": float(count(_WHY) > 0),
            "constraints": math.log1p(count(_CONSTRAINTS)),
            "write": float(count(_WRITE) > 0),
            "code": float("```" in text or count(_CODE) > 0),
            "maths": float(count(_MATHS) > 0 or any(symbol in text for symbol in _SYMBOLS)),
            "looks up": _known(asks, there),
            "repeats": 1 - len(there) / len(words) if words else 0.0,
            "foreign": float(language is not None and language != "en"),
            "schema": float(facts.request.wants_json),
            "answer": 0.0 if facts.params.max_tokens is None else math.log1p(facts.params.max_tokens),
        }


def _known(asks: str, there: Counter[str]) -> float:
    """How much of the last sentence's longer words stand before it too: it asks for something that is there."""
    asked = Counter(word for word in _WORD.findall(asks.lower()) if len(word) > 3)
    return sum(there[word] > times for word, times in asked.items()) / len(asked) if asked else 0.0


def _ends(text: str) -> str:
    return text if len(text) <= MOST else f"{text[: MOST // 2]}\n{text[-MOST // 2 :]}"
