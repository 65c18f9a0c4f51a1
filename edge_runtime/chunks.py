"""How the tokens of a prompt are cut into steps."""

from __future__ import annotations

from collections.abc import Iterator


def next_chunk(pending: int, limit: int) -> int:
    """How many of ``pending`` tokens to feed next, at most ``limit``; never so that a single one is left over."""
    return limit - 1 if pending == limit + 1 and limit > 2 else min(pending, limit)


def chunks(start: int, stop: int, limit: int) -> Iterator[tuple[int, int]]:
    """(first token, length) of each step in which the tokens ``start`` to ``stop`` of a prompt are fed."""
    while start < stop:
        length = next_chunk(stop - start, limit)
        yield start, length
        start += length
