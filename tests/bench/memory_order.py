"""What :mod:`tests.bench.memory` has its process do."""

from __future__ import annotations

import msgspec

NEW = 16
"""Tokens of an answer."""


class Order(msgspec.Struct, frozen=True):
    """What the measured process does."""

    package: str
    device: str
    prompts: list[int]
    """Lengths, all at once."""
    new_tokens: int = NEW
    budget: int | None = None
    threads: int | None = None
    prefix_store: int = 0
    """Bytes of disk."""
    rounds: int = 1
    """How many times the model is opened, used and closed."""


class Answer(msgspec.Struct, frozen=True):
    """Bytes."""

    peak: int
    before: int
    """Resident before the model was opened for the last time: engine and tokenizer's library are there by then."""
    used: int
    """When its last request had ended."""
    after: int
    """When it was closed and forgotten."""

    @property
    def given_back(self) -> float:
        """Of what loading and running took, the share that unloading gave back."""
        return (self.used - self.after) / (self.used - self.before)
