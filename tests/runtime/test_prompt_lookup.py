"""Drafts are what a plain search of the whole history finds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.drafting.prompt_lookup import LONGEST_DRAFT, LONGEST_KEY, SHORTEST_KEY, PromptLookup


def plain_draft(tokens: list[int], count: int) -> list[int]:
    """The twin: the longest key first, its latest earlier occurrence."""
    for size in range(LONGEST_KEY, SHORTEST_KEY - 1, -1):
        for end in range(len(tokens) - 1, size - 1, -1):
            if tokens[end - size : end] == tokens[-size:]:
                grown = list(tokens)
                for place in range(end, end + count):
                    grown.append(grown[place])
                return grown[len(tokens) :]
    return []


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=8), st.integers(1, 4))
def test_agrees_with_a_plain_search(pieces: list[list[int]], limit: int) -> None:
    lookup, tokens = PromptLookup(), list[int]()
    for piece in pieces:
        tokens += piece
        assert lookup.draft(tokens, limit) == plain_draft(tokens, limit)


def test_a_copy_is_drafted() -> None:
    assert PromptLookup().draft([1, 2, 3, 4, 5, 6, 9, 1, 2, 3], 15) == [4, 5, 6, 9]
    assert PromptLookup().draft([1, 2, 3, 4, 5, 6, 9, 1, 2, 3], 2) == [4, 5]
    assert PromptLookup().draft([1, 2, 3], 15) == []
    assert PromptLookup().draft([], 15) == []


def test_length_adapts() -> None:
    lookup = PromptLookup()
    history = [*range(100), 0, 1, 2]

    def length() -> int:
        return len(lookup.draft(history, 100))

    assert length() == 4
    lookup.report(4, 4)
    assert length() == 8
    lookup.report(8, 8)
    assert length() == LONGEST_DRAFT
    lookup.report(LONGEST_DRAFT, 5)
    assert length() == 6
    lookup.report(6, 1)
    assert length() == 2


def test_a_text_that_never_repeats_itself_is_left_alone() -> None:
    lookup = PromptLookup()
    drafts = 0
    for _ in range(200):
        draft = lookup.draft([*range(50), 0, 1], 4)
        if draft:
            drafts += 1
            lookup.report(len(draft), 0)
    assert drafts < 15
    lookup = PromptLookup()
    lookup.report(4, 0)
    assert lookup.draft([*range(50), 0, 1], 4)  # one failure is nothing
