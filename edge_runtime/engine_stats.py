"""What an engine has done so far."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineStats:
    """A glance at the engine, for operators."""

    running: int
    running_tokens: int
    """Tokens of their KV cache."""
    waiting: int
    pending: tuple[int, ...]
    """Prompt tokens that are still to be run of each request that runs or waits, as far as there are any."""
    cached_sequences: int
    cached_tokens: int
    generated_tokens: int
    prompt_tokens: int
    """Prompt tokens computed, not counting cached ones."""
    preemptions: int
    drafted_tokens: int
    accepted_tokens: int
    """Of the drafted ones, those that held."""
    forward_seconds: float
    """Time the decoder has taken so far, failed steps included."""
    inference_seconds: float
    """Of it, time inside the inference engine's own calls."""
