"""What can be seen to be wrong with an answer without any model."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from edge_runtime.facts import Facts
from edge_runtime.policy.language import language_of

PERIODS = 12
"""Tokens that may come round and round."""
ROUNDS = 4
_REFUSAL = re.compile(
    r"^\W*(?:i'?m sorry|i am sorry|sorry|unfortunately|as an ai\b|i can(?:'|no)t|i cannot|i'?m (?:not able|unable)|"
    r"i am (?:not able|unable)|i do(?:n'?t| not) (?:have|know)|i'?m just an? )",
    re.I,
)
_TRANSLATES = re.compile(
    r"\b(?:translat\w*|in (?:english|german|french|spanish|italian|portuguese|chinese|japanese|russian|dutch|polish)|"
    r"auf \w+isch|übersetz\w*|tradu\w*)\b",
    re.I,
)
ENOUGH_TEXT = 40
"""Characters before the language of an answer is judged."""


class PlainChecks:
    """A stage."""

    def problem(self, text: str, tokens: Sequence[int], ended: bool, facts: Facts) -> str | None:
        found = repetition(tokens) or refusal(text) or wrong_language(text, facts.question, facts.language)
        if found is None and facts.request.wants_json:
            found = broken_json(text, ended)
        return found


def repetition(tokens: Sequence[int]) -> str | None:
    """The same few tokens, again and again, at the end."""
    for period in range(1, PERIODS + 1):
        span = period * ROUNDS
        if len(tokens) < span:
            return None
        tail = list(tokens[-span:])
        if tail == tail[:period] * ROUNDS:
            return f"it repeats itself: the last {period} tokens came {ROUNDS} times"
    return None


def refusal(text: str) -> str | None:
    found = _REFUSAL.match(text)
    return None if found is None else f"it declines to answer ({found[0].strip()!r})"


def wrong_language(text: str, question: str, asked_in: str | None) -> str | None:
    """Another language than the question's, which asks for no translation."""
    if asked_in is None or len(text) < ENOUGH_TEXT or _TRANSLATES.search(question):
        return None
    language = language_of(text)
    return None if language in (None, asked_in) else f"it is in {language}, the question in {asked_in}"


def broken_json(text: str, ended: bool) -> str | None:
    """No JSON, where JSON was asked for; cut off, if it has ended. More cannot be wrong with its form: the sampler
    holds it to the schema (:mod:`edge_runtime.constraints`), and what it cannot be held to is not begun here."""
    begun = text.lstrip().removeprefix("```json").lstrip("`\n ")
    if begun and begun[0] not in "{[":
        return "it is no JSON"
    if not ended:
        return None
    try:
        json.loads(begun.rstrip("`\n "))
    except (ValueError, RecursionError) as error:
        return f"its JSON is broken: {error}"
    return None
