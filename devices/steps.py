"""What every decoder checks before it changes anything."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from devices.base import SNAPSHOT_STEP, DecoderLimits, Snapshot, Step
from devices.errors import ContextOverflow, EngineError


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
    if tokens.dtype.kind not in "iu":
        raise ValueError(f"token ids must be integers, not {tokens.dtype}")
    if count > limits.prefill_chunk:
        raise ValueError(f"a step of {count} tokens is longer than prefill_chunk ({limits.prefill_chunk}); split it")
    if not 0 <= step.rows <= count:
        raise ValueError(f"rows = {step.rows} is not within 0..{count}, the step's tokens")
    # one token needs no reduction: two of them take 70 µs when a step has just swept the processor's caches
    low, high = (int(tokens[0]),) * 2 if count == 1 else (int(tokens.min()), int(tokens.max()))
    if low < 0 or high >= vocab_size:
        raise ValueError(f"token id {low if low < 0 else high} is outside the vocabulary of {vocab_size}")
    length = step.sequence.length + count
    if length > limits.max_context:
        raise ContextOverflow(
            f"{step.sequence.length} + {count} tokens pass the context of {limits.max_context}; crop the sequence "
            "or start a new one"
        )


def as_rows(logits: NDArray[np.float32], rows: int, vocab_size: int) -> NDArray[np.float32]:
    """What a graph gave, as (rows, vocab_size). EngineError if that is not what it gave."""
    if logits.size != rows * vocab_size or (rows and logits.shape[-1] != vocab_size):
        raise EngineError(
            f"the graph gives logits of shape {logits.shape} for {rows} tokens and a vocabulary of {vocab_size}: its "
            "package is of another model; pull or export it again"
        )
    return logits.reshape(rows, vocab_size)


def check_rope_switch(length: int, switch: int | None, on_long: bool) -> None:
    """ContextOverflow when a sequence on the short rotary factors would reach ``length`` tokens."""
    if switch is not None and not on_long and length > switch:
        raise ContextOverflow(
            f"{length} tokens pass the rope switch of {switch}, but the sequence was opened for fewer; "
            f"prefill a new sequence opened with expected={length} or more"
        )


def snapshot_stop(start: int, stop: int | None, length: int) -> int:
    """Where a snapshot of a sequence of ``length`` tokens ends; ValueError as ``DecoderSequence.snapshot`` says."""
    stop = length if stop is None else stop
    if start % SNAPSHOT_STEP or not 0 <= start <= stop <= length:
        raise ValueError(
            f"tokens {start} to {stop} are no snapshot of the {length} held: it begins at a multiple of {SNAPSHOT_STEP}"
        )
    return stop


def check_follows(snapshot: Snapshot, length: int, limits: DecoderLimits) -> None:
    """EngineError or ContextOverflow unless ``snapshot`` can follow on ``length`` tokens."""
    if snapshot.start != length:
        raise EngineError(f"a snapshot from token {snapshot.start} on does not follow on the {length} tokens held")
    if length + snapshot.length > limits.max_context:
        raise ContextOverflow(
            f"{length} + {snapshot.length} tokens of a snapshot pass the context of {limits.max_context}"
        )
