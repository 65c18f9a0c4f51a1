"""What every decoder checks of a batch before it runs any of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from devices.base import DecoderLimits, Step
from devices.errors import ContextOverflow


def check_batch(batch: Sequence[Step], limits: DecoderLimits, vocab_size: int) -> None:
    """ValueError or ContextOverflow as :meth:`devices.base.Decoder.forward` says; changes nothing."""
    if not batch:
        raise ValueError("the batch is empty; give forward at least one step")
    if len({id(step.sequence) for step in batch}) != len(batch):
        raise ValueError("a sequence is in the batch twice; join its tokens into one step")
    for step in batch:
        _check_step(step, limits, vocab_size)


def _check_step(step: Step, limits: DecoderLimits, vocab_size: int) -> None:
    tokens, count = step.tokens, step.tokens.size
    if tokens.ndim != 1 or count == 0:
        raise ValueError(f"a step needs a vector of at least one token, not shape {tokens.shape}")
    if not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"token ids must be integers, not {tokens.dtype}")
    if count > limits.prefill_chunk:
        raise ValueError(f"a step of {count} tokens is longer than prefill_chunk ({limits.prefill_chunk}); split it")
    if not 0 <= step.rows <= count:
        raise ValueError(f"rows = {step.rows} is not within 0..{count}, the step's tokens")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"token id {low if low < 0 else high} is outside the vocabulary of {vocab_size}")
    length = step.sequence.length + count
    if length > limits.max_context:
        raise ContextOverflow(
            f"{step.sequence.length} + {count} tokens pass the context of {limits.max_context}; crop the sequence "
            "or start a new one"
        )


def check_rope_switch(length: int, switch: int | None, on_long: bool) -> None:
    """ContextOverflow when a sequence on the short rotary factors would reach ``length`` tokens."""
    if switch is not None and not on_long and length > switch:
        raise ContextOverflow(
            f"{length} tokens pass the rope switch of {switch}, but the sequence was opened for fewer; "
            f"prefill a new sequence opened with expected={length} or more"
        )
