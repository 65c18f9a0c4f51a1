"""The consistency checker: several short continuations of one prompt, drawn in one batch from its shared prefix."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from edge_runtime.prompts import TierRequest
from edge_runtime.routing.answer_signals import agreement
from edge_runtime.sampling import SamplingParams
from edge_runtime.tiers.model import LocalModel

TEMPERATURE = 0.5


async def consistency(model: LocalModel, prepared: TierRequest, forks: int, tokens: int) -> float:
    """How alike they are, 0 to 1. EdgeError as the engine's.

    The prompt is in the KV cache already, or is just being put there; the engine forks it for each continuation and
    decodes them in the batches that it runs anyway.
    """
    params = fork_params(prepared.params, forks, tokens)
    found: list[list[int]] = [[] for _ in range(forks)]
    generation = await asyncio.to_thread(model.start, replace(prepared, params=params, watch=None))
    try:
        async for chunk in generation:
            found[chunk.index] += chunk.checked().token_ids
    finally:
        generation.close()
    return agreement(found)


def fork_params(params: SamplingParams, forks: int, tokens: int) -> SamplingParams:
    """How the continuations of a request with ``params`` are drawn."""
    return SamplingParams(
        temperature=TEMPERATURE, top_k=0, top_p=1.0, min_p=0.0, max_tokens=tokens, n=forks, seed=params.seed or 0
    )
