"""Drafts for answers that repeat their prompt: what followed the last few tokens when they stood there before.

Prompt lookup decoding (Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding): the draft costs nothing,
and one call of the decoder checks all of it. A drafted token counts only if the sampler picks it from the model's own
logits, so the answer is the one that plain decoding gives, at any temperature.
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST_KEY, SHORTEST_KEY = 4, 2
"""Tokens that must have stood there before. One repeats by chance too often to be worth the check."""
LONGEST_DRAFT = 15
"""With the token before it, one padded step of the decoders; longer ones cost as much as they gain on a CPU."""


class PromptLookup:
    """Drafts for one growing token sequence. Not thread safe."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._ends: list[dict[tuple[int, ...], int]] = [{} for _ in range(SHORTEST_KEY, LONGEST_KEY + 1)]
        """For each key length: key → where its latest occurrence but the one at the very end, ends."""
        self._length = 4
        self._wait = 0
        self._misses = 0
        self._asked = False
        """The newest draft is one of its own."""

    def draft(self, tokens: Sequence[int], limit: int) -> list[int]:
        """At most ``limit`` tokens that may follow ``tokens``, which begin with those of the last call."""
        found = self._find(tokens, limit)
        self._asked = bool(found)
        return found

    def _find(self, tokens: Sequence[int], limit: int) -> list[int]:
        if self._wait:
            self._wait -= 1
            return []
        self._learn(tokens)
        for index in reversed(range(len(self._ends))):
            size = SHORTEST_KEY + index
            end = self._ends[index].get(tuple(self._tokens[-size:]))
            if end is not None:
                return self._continued(end, min(limit, self._length))
        return []

    def _learn(self, tokens: Sequence[int]) -> None:
        """Note every key that ends before the newest token; that of the newest is what is looked up."""
        for token in tokens[len(self._tokens) :]:
            for index, ends in enumerate(self._ends):
                size = SHORTEST_KEY + index
                if len(self._tokens) >= size:
                    ends[tuple(self._tokens[-size:])] = len(self._tokens)
            self._tokens.append(token)

    def _continued(self, end: int, count: int) -> list[int]:
        """The tokens after ``end``; past the newest, the draft goes on with itself (a loop repeats)."""
        draft: list[int] = []
        for place in range(end, end + count):
            draft.append(self._tokens[place] if place < len(self._tokens) else draft[place - len(self._tokens)])
        return draft

    def report(self, drafted: int, accepted: int) -> None:
        """How a draft fared: the next is longer after a whole success, shorter after a failure.

        After drafts of which nothing held, the next ones are skipped, for longer each time. A draft of somebody else's
        is none of its business.
        """
        if not self._asked:
            return
        if accepted == drafted:
            self._length = min(2 * self._length, LONGEST_DRAFT)
        else:
            self._length = max(accepted + 1, 2)
        self._misses = 0 if accepted else self._misses + 1
        self._wait = min(2**self._misses, 32) if self._misses > 1 else 0
