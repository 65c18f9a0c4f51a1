"""In which type a request keeps its KV cache, on devices where each sequence has its own (``--kv-type auto``).

Long prompts take the smaller type: their cache is what fills the memory, and 8-bit keys and values, turned before they
are rounded, choose the same next token as float16 at 99.2 % of places (tests/bench/NOTES.md). Short ones take the most
faithful type as long as there is room. A request keeps its type to its end.
"""

from __future__ import annotations

from devices.base import DecoderLimits
from devices.kv_types import KVType

LONG = 2048
"""Tokens of a prompt from which it counts as long."""
FAITHFUL = 0.99
"""Share of next tokens that must be chosen alike for a type to be taken where memory is not short."""
AGREEMENT: dict[KVType, float] = {"float32": 1.0, "float16": 1.0, "int8": 0.992}
"""Next tokens chosen as with float16, on 4,096 tokens with fp32 weights: measured with ``edge:cpu``."""


class PrecisionManager:
    """Chooses for one decoder, if it has ``limits.kv_choices``."""

    def __init__(self, limits: DecoderLimits) -> None:
        self._choices = limits.kv_choices

    def choose(self, tokens: int, free: int, begun: KVType | None = None) -> KVType:
        """For a prompt of ``tokens`` tokens, where ``free`` bytes of KV cache are left.

        ``begun``: the type in which most of the prompt is known already; kept, if there is room, as computing it anew
        costs more than any type saves.
        """
        fitting = [each.kv_type for each in self._choices if tokens * each.bytes_per_token <= free]
        if begun in fitting:
            return begun
        if tokens >= LONG:
            fitting = [each for each in fitting if AGREEMENT[each] >= FAITHFUL][-1:] or fitting
        return fitting[0] if fitting else self._choices[-1].kv_type
