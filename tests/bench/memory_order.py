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
    prefix_store: int = 0
    """Bytes of disk."""
    rounds: int = 1
    """How many times the model is opened, used and closed."""
