"""Text from a stream of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class TokenDecoder(Protocol):
    """What the engine needs of a tokenizer; ``tokenizers.Tokenizer`` has it."""

    def decode(self, ids: Sequence[int], skip_special: bool = True, /) -> str:
        """The text of ``ids``; unknown ids add nothing."""

    def id_to_token(self, token_id: int, /) -> str | None:
        """The vocabulary's own string, e.g. ``"▁the"`` or ``"<0x0A>"``; None: no such token."""
