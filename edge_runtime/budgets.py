"""What a memory budget leaves for the KV cache of a model about to be loaded; who is refused, and what would do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import psutil

from devices.base import DecoderOptions
from devices.discovery import Device, facts, probe_device
from devices.host import host_memory
from devices.kv_types import KVWish
from devices.names import KNOWN, RUNNABLE
from edge_runtime.errors import BudgetError
from edge_runtime.footprint import KV_TYPES, Model, Use, footprint, least_budget, tokens_needed, tokens_within
from edge_runtime.heap import return_free_heap
from edge_runtime.memory import BudgetSize, format_bytes
from edge_runtime.package import Package, Variant, Weights

DEFAULT_SHARE = 0.8
"""Of the memory that is free, where no budget is given; the rest is for the system, and whoever else grows."""


class Budget(NamedTuple):
    """A limit in bytes, and whether somebody has asked for it."""

    nbytes: int
    asked: bool = True

    def __str__(self) -> str:
        size = format_bytes(self.nbytes)
        return f"the budget of {size}" if self.asked else f"{size}, {DEFAULT_SHARE:.0%} of the memory that is free"


def resolve(size: BudgetSize | None, device: Device) -> Budget | None:
    """``size`` on ``device``, or what memory there is, if that is less; where none is given, a share of what is free.

    None: nobody asks, and nothing is known of the device's memory. ConfigError for a percentage of such a one.
    """
    memory = facts(device).memory if size is None or size.percent is not None else None
    if size is not None:
        given = size.within(lambda: None if memory is None else memory.total)
        return Budget(min(given, host_memory().total) if device.name.endswith(":cpu") else given)
    return None if memory is None else Budget(int(memory.free * DEFAULT_SHARE), asked=False)


def share_out(
    size: BudgetSize | None,
    device: Device,
    package: Package,
    variant: Variant,
    *,
    kv_type: KVWish | None = None,
    max_sequences: int = DecoderOptions.max_sequences,
    chunk: int = DecoderOptions.prefill_chunk,
    store_bytes: int = 0,
    sharing: int = 1,
    kept: int = 0,
) -> tuple[int | None, int]:
    """Tokens of KV cache for a model about to be opened in this process, and bytes of disk for its prefixes.

    A budget that was given is used to the full, for as many contexts as there may be sequences. Without one there is
    one context, if it fits (None: the device's default). Where memory is short the store goes first. ``sharing``: how
    many devices have the budget together, each an equal part. ``kept``: bytes of it that something else will take.
    BudgetError says what would do.
    """
    budget = resolve(size, device)
    if budget is None:
        return None, store_bytes
    budget = budget._replace(nbytes=budget.nbytes // sharing - kept)
    model = Model.of(package, variant)
    context = model.architecture.max_context
    use = Use(context * (max_sequences if budget.asked else 1), max_sequences, chunk, kv_type)
    # what is in use already is not free either
    resident = _resident(device) if budget.asked else 0
    for kept in dict.fromkeys((store_bytes, 0)):
        tokens = tokens_within(budget.nbytes, model, use._replace(prefix_store=kept > 0), resident)
        if tokens >= tokens_needed(model, use):
            return tokens if budget.asked or tokens < context else None, kept
    raise BudgetError(refusal(budget, model, variant.name, use, package, resident))


def _resident(device: Device) -> int:
    """What this process has already of the memory that the model will be in."""
    if not device.name.endswith(":cpu"):
        return 0
    return_free_heap()  # reading the tokenizer left some
    return int(psutil.Process().memory_info().rss)


def put_aside(
    package: Package, names: Iterable[str], weights: Weights | None, size: BudgetSize | None, kv_type: KVWish | None
) -> Mapping[str, str]:
    """Those of the devices ``names`` on which no variant of ``package`` fits the budget, and why.

    BudgetError if that is all that could run it.
    """
    aside: dict[str, str] = {}
    fitting = False
    use = Use(package.manifest.architecture.max_context, kv_type=kv_type)
    for name in names:
        least = {
            variant.name: least_budget(Model.of(package, variant), use)
            for variant in package.manifest.variants
            if variant.engine == KNOWN[name].engine and weights in (None, variant.weights)
        }
        device = probe_device(name) if least and name in RUNNABLE else None
        budget = resolve(size, device) if device is not None and device.ready else None
        if budget is None:
            continue
        smallest = min(least, key=lambda variant: least[variant])
        if least[smallest] > budget.nbytes:
            aside[name] = f"{smallest} needs {format_bytes(least[smallest])}, more than {budget}"
        else:
            fitting = True
    if aside and not fitting:
        raise BudgetError(
            f"no variant of {package.name} fits: "
            + "; ".join(f"{name}: {why}" for name, why in aside.items())
            + "; take a larger budget or a smaller model (edge-glm plan shows what each part takes)"
        )
    return aside


def refusal(
    budget: Budget, model: Model, variant: str, use: Use, package: Package | None = None, resident: int = 0
) -> str:
    """Why ``variant`` cannot be opened under ``budget``, the least that would do, and what else would fit."""
    needed = tokens_needed(model, use)
    parts = footprint(model, use._replace(tokens=needed, prefix_store=False), resident)
    said = f"base {format_bytes(parts.base)}, weights {format_bytes(parts.weights)}"
    running = f"{format_bytes(parts.kv)} for {needed} tokens of KV cache, activations {format_bytes(parts.activations)}"
    loads = parts.loading > parts.kv + parts.activations
    loading = f"{format_bytes(parts.loading)} more while loading" if loads else ""
    others = list(_others(budget, model, variant, use, package))
    asked = "a larger budget" if budget.asked else "ending other programs, or a --memory-budget of your own"
    return (
        f"{variant} needs {format_bytes(parts.budget)} at least ({said}, {loading or running}), which is more than "
        f"{budget}; what would do: {'; '.join([*others, asked])}"
    )


def _others(budget: Budget, model: Model, variant: str, use: Use, package: Package | None) -> Iterator[str]:
    for kv_type in KV_TYPES[model.engine]:
        least = least_budget(model, use._replace(kv_type=kv_type))
        if use.kv_type not in (None, kv_type) and least <= budget.nbytes:
            yield f"--kv-type {kv_type}, with {format_bytes(least)}"
    if package is None:
        return
    for other in package.manifest.variants:
        least = least_budget(Model.of(package, other), use._replace(kv_type=None))
        if other.name != variant and least <= budget.nbytes:
            yield f"the variant {other.name}, with {format_bytes(least)}"
