"""Which tiers may take a request, in which order, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edge_runtime.sampling import SamplingParams
from edge_runtime.tiers.base import Fit


@dataclass(frozen=True)
class Route:
    """The router's decision."""

    order: tuple[str, ...]
    """Names of the tiers that may take the request, best first; empty: none may."""
    reasons: Mapping[str, str]
    """For every tier: why it is in ``order``, or why not."""


class Router:
    """Rules without state. The one rule there is so far: prompt and answer must fit the tier's context."""

    @staticmethod
    def choose(params: SamplingParams, tiers: Sequence[tuple[str, Fit]]) -> Route:
        """Order ``tiers`` (name and fit, in the user's order of preference). A pure function."""
        verdicts = [(name, *_verdict(params, fit)) for name, fit in tiers]
        return Route(
            tuple(name for name, accepted, _ in verdicts if accepted),
            {name: reason for name, _, reason in verdicts},
        )


def _verdict(params: SamplingParams, fit: Fit) -> tuple[bool, str]:
    prompt = f"the prompt has {fit.prompt_tokens} tokens"
    if fit.prompt_tokens > fit.max_prompt:
        return False, f"{prompt}, this model and device take {fit.max_prompt}"
    asked = 1 if params.max_tokens is None else params.max_tokens
    if fit.prompt_tokens + asked > fit.max_context:
        more = "" if params.max_tokens is None else f" and max_tokens asks for {asked} more"
        return False, f"{prompt}{more}; prompt and answer together may have {fit.max_context}"
    return True, f"{prompt} and fits the context of {fit.max_context}"
