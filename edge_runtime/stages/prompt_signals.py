"""What speaks for or against a small model's answer: from the text of a request, before anything has run.

Every signal is a number, larger or smaller without bounds or a share of 0 to 1; which way it counts is for the
calibration to say. Together they take a fraction of a millisecond: of long texts only the ends are looked at.
"""

from __future__ import annotations

import math
import re

from edge_runtime.facts import Facts

MOST = 4000
"""Characters of a text that are looked at: half at its beginning, half at its end."""

_WORD = re.compile(r"\w+")
_PART = re.compile(r"(?<=[.!?:;])\s+|\n+")
_NUMBER = re.compile(r"\d+")
_SENTENCE = re.compile(r"[.!?;]+\s|[.!?;]+$|\n")
_OPERATOR = re.compile(
    r"\d\s?[-+*/×÷^=<>]\s?\d|\b(?:plus|minus|times|divided by|percent|sum|difference|product|total)\b"
)
_COUNTING = re.compile(r"\b(?:calculate|compute|how many|in total|solve|double|half|add|subtract|multiply|result)\b")
_ORDER = re.compile(
    r"\b(?:sort|order|rank|largest|smallest|largest|longest|alphabetical|ascending|descending|compare)\b"
)
_COPY = re.compile(r"\b(?:repeat|copy|exactly|again|verbatim|same words|quote)\b")
_FIND = re.compile(r"\b(?:what|which|who|where|when|find|extract|name)\b")
_STEPS = re.compile(r"\b(?:then|after that|first|next|finally|step|steps|therefore|if|unless)\b")
_WHY = re.compile(r"\b(?:why|explain|prove|derive|analy[sz]e|compare|evaluate|design|plan|discuss)\b")
_CONSTRAINT = re.compile(
    r"\b(?:must|only|exactly|at least|at most|no more than|without|never|always|not|each|every|all|words or less)\b"
)
_WRITE = re.compile(r"\b(?:write|translate|summari[sz]e|rewrite|essay|poem|story|list|table)\b")
_CODE = re.compile(r"```|\b(?:def|class|function|import|return|python|javascript|sql|regex|code|bug)\b|[{};]\s*$", re.M)
_MATHS = re.compile(r"[∑∫√π≤≥≠]|\\(?:frac|sum|int)|\b(?:integral|derivative|equation|theorem|probability|matrix)\b")


class PromptSignals:
    """A stage."""

    def signals(self, facts: Facts) -> dict[str, float]:
        """Of the last question of the user and the conversation before it."""
        text = _ends(facts.question)
        low = text.lower()
        words = low.split()
        numbers = _NUMBER.findall(text)
        lines = text.count("\n") + 1
        *told, asks = _PART.split(text.strip())
        language = facts.language
        return {
            "tokens": math.log1p(facts.tokens),
            "words": math.log1p(len(words)),
            "sentences": math.log1p(len(_SENTENCE.findall(text))),
            "lines": math.log1p(lines),
            "turns": math.log1p(max(0, len(facts.messages) - 1)),
            "history": math.log1p(len(facts.history)),
            "numbers": math.log1p(len(numbers)),
            "digits": max(map(len, numbers), default=0) / 4,
            "commas": math.log1p(text.count(",")),
            "questions": float(text.count("?")),
            "computes": float(len(numbers) > 1 and bool(_COUNTING.search(low) or _OPERATOR.search(low))),
            "operators": math.log1p(len(_OPERATOR.findall(low))),
            "counting": math.log1p(len(_COUNTING.findall(low))),
            "order": float(bool(_ORDER.search(low))),
            "copy": float(bool(_COPY.search(low))),
            "find": float(bool(_FIND.search(low))),
            "steps": math.log1p(len(_STEPS.findall(low))),
            "why": float(bool(_WHY.search(low))),
            "constraints": math.log1p(len(_CONSTRAINT.findall(low))),
            "write": float(bool(_WRITE.search(low))),
            "code": float(bool(_CODE.search(text))),
            "maths": float(bool(_MATHS.search(low))),
            "looks up": _known(asks, told),
            "repeats": 1 - len(set(words)) / len(words) if words else 0.0,
            "foreign": float(language is not None and language != "en"),
            "schema": float(facts.about.schema),
            "answer": 0.0 if facts.params.max_tokens is None else math.log1p(facts.params.max_tokens),
        }


def _known(asks: str, told: list[str]) -> float:
    """How much of the last sentence's longer words the text before it holds: it asks for something that is there."""
    words = {word for word in _WORD.findall(asks.lower()) if len(word) > 3}
    there = set(_WORD.findall(" ".join(told).lower()))
    return len(words & there) / len(words) if words else 0.0


def _ends(text: str) -> str:
    return text if len(text) <= MOST else f"{text[: MOST // 2]}\n{text[-MOST // 2 :]}"
