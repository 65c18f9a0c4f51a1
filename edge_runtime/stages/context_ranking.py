"""A conversation that is too long, without the messages that have least to do with its last one."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

from edge_runtime.facts import text_of
from edge_runtime.stages.protocols import Conversation

K1, B = 1.5, 0.75
"""Of BM25, as Lucene has them."""


class ContextRanking:
    """Ranks messages by BM25 (Robertson and Zaragoza, 2009) against the last one and leaves the lowest out, oldest
    first among equals; system messages and the last message stay. Off unless the policy names it."""

    def shorten(self, messages: Conversation, count: Callable[[Conversation], int], room: int) -> Conversation:
        if not messages:
            return messages
        kept = list(range(len(messages)))
        scores = _bm25([text_of(message) for message in messages[:-1]], text_of(messages[-1]))
        order = sorted(range(len(messages) - 1), key=lambda place: (scores[place], place))
        for place in order:
            if count([messages[each] for each in kept]) <= room:
                break
            if messages[place].get("role") != "system":
                kept.remove(place)
        return [messages[each] for each in kept]


def _bm25(texts: Sequence[str], query: str) -> list[float]:
    documents = [Counter(_words(text)) for text in texts]
    lengths = [sum(document.values()) for document in documents]
    mean = sum(lengths) / max(len(lengths), 1) or 1.0
    scores = [0.0] * len(documents)
    for word in set(_words(query)):
        holding = sum(word in document for document in documents)
        rarity = math.log(1 + (len(documents) - holding + 0.5) / (holding + 0.5))
        for place, document in enumerate(documents):
            times = document[word]
            scores[place] += rarity * times * (K1 + 1) / (times + K1 * (1 - B + B * lengths[place] / mean) or 1.0)
    return scores


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
