"""Which of a package's variants is opened on a device where any weights will do (``--weights auto``).

The smallest that keeps the model's answers. Where that leaves too little memory for the KV cache of a prompt, the next
that leaves enough.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from devices.base import DecoderOptions
from devices.discovery import Device
from devices.kv_types import KVWish
from edge_runtime.budgets import Budget, resolve
from edge_runtime.footprint import Model, Use, tokens_needed, tokens_within
from edge_runtime.memory import BudgetSize
from edge_runtime.package import WEIGHTS, Package, Variant, Weights
from edge_runtime.placement import Placement

FAITHFUL = 0.01
"""So much more loss per token than the widest weights have, and the answers count as kept."""
_FAITHFUL_UNMEASURED = ("fp32", "fp16", "int8")

Losses = Callable[[str], Mapping[Weights, float]]
"""A model's name → what ``edge-glm bench`` measured of it here: nats per token by weights."""


class Found(NamedTuple):
    variant: Variant
    reason: str


class Variants:
    """Chooses under a budget."""

    def __init__(
        self,
        losses: Losses,
        size: BudgetSize | None,
        kv_type: KVWish | None = None,
        max_sequences: int = DecoderOptions.max_sequences,
    ) -> None:
        self._losses = losses
        self._size = size
        self._kv_type = kv_type
        self._max_sequences = max_sequences

    @property
    def bounded(self) -> bool:
        """There is a budget."""
        return self._size is not None

    def refine(self, placement: Placement) -> Placement:
        """With the best variant, if there is one that fits."""
        found = self.choose(placement.package, placement.device)
        return placement if found is None else placement._replace(variant=found.variant, weights_reason=found.reason)

    def choose(
        self,
        package: Package,
        device: Device,
        tokens: int | None = None,
        among: Sequence[Variant] | None = None,
        within: int | None = None,
    ) -> Found | None:
        """The best for ``device`` that has room for ``tokens`` tokens of KV cache, and why; None if none has.

        ``tokens`` None: as many as a model needs to be opened. ``among``: None for all of the package's. ConfigError as
        :func:`edge_runtime.budgets.resolve`. ``within``: bytes that the process may have, in place of the budget.
        """
        budget = resolve(self._size, device) if within is None else Budget(within)
        losses = self._losses(package.name)
        among = package.manifest.variants if among is None else among
        present = [each for each in among if each.engine == device.engine]
        passed_over: list[str] = []
        for variant in rank(present, losses):
            model = Model.of(package, variant)
            context = model.architecture.max_context
            use = Use(context * self._max_sequences, self._max_sequences, kv_type=self._kv_type, prefix_store=False)
            room = use.tokens if budget is None else tokens_within(budget.nbytes, model, use)
            needed = tokens_needed(model, use) if tokens is None else min(tokens, context)
            if room >= needed:
                kept = "which keep the answers" if keeps_answers(variant, losses) else "the most faithful here"
                reason = f"{variant.weights} weights, {kept}"
                return Found(variant, f"{reason}; not {'; not '.join(passed_over)}" if passed_over else reason)
            passed_over.append(f"{variant.name}: within {budget} it has room for {room} tokens, not {needed}")
        return None


def rank(variants: Sequence[Variant], losses: Mapping[Weights, float]) -> list[Variant]:
    """Of those that keep the answers the smallest first, then the others, the largest first."""
    kept = [each for each in variants if keeps_answers(each, losses)]
    others = [each for each in variants if not keeps_answers(each, losses)]
    return sorted(kept, key=lambda each: each.bytes) + sorted(others, key=lambda each: -each.bytes)


def keeps_answers(variant: Variant, losses: Mapping[Weights, float]) -> bool:
    """By what was measured; unless that was done, all but int4 do."""
    widest = next((each for each in WEIGHTS if each in losses), None)
    if widest is None or variant.weights not in losses or len(losses) == 1:
        return variant.weights in _FAITHFUL_UNMEASURED
    return losses[variant.weights] <= losses[widest] * (1 + FAITHFUL)
