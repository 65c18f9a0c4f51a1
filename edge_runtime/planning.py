"""What a model would take on each device, before anything is loaded, and which of them would be chosen.

Sizes come from the package if the model is here, else from the header of a file on this disk or from the shape of a
made-up model; nothing is exported or downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from devices.base import DecoderOptions, Engine
from devices.discovery import Device, probe_device
from devices.kv_types import KVWish
from devices.names import KNOWN, OPTIONAL, parse_device
from edge_runtime.budgets import Budget, resolve
from edge_runtime.drafting.opening import draft_bytes
from edge_runtime.errors import BudgetError, ConfigError, ModelNotFound, NotMeasured
from edge_runtime.exporting import variant_name
from edge_runtime.footprint import (
    KV_TYPES,
    Footprint,
    Model,
    Use,
    footprint,
    least_budget,
    tokens_needed,
    tokens_within,
)
from edge_runtime.machine import fingerprint
from edge_runtime.measurements import Measurements, Workload
from edge_runtime.memory import BudgetSize, format_bytes
from edge_runtime.package import Package, Weights, WeightsWish
from edge_runtime.placement import Wish, place
from edge_runtime.store import Store
from edge_runtime.timing.fitted import timing_model
from edge_runtime.timing.model import TimingModel
from edge_runtime.tuning.apply import tuned
from edge_runtime.variants import rank

MOST_SEQUENCES = 4096


@dataclass(frozen=True)
class Need:
    """What a model shall be opened for. None: as it is opened where nothing is said."""

    weights: WeightsWish | None = None
    kv_type: KVWish | None = None
    context: int | None = None
    """Tokens of each sequence."""
    sequences: int | None = None
    workload: Workload = "one"
    prefix_store: bool = True
    draft: str | None = None
    """A smaller model that drafts."""
    draft_device: str | None = None
    """None: the model's."""


@dataclass(frozen=True)
class Candidate:
    """A variant on a device."""

    device: str
    variant: str
    parts: Footprint
    """For the use that was asked for; if none was, for what of the usual one fits."""
    least: int
    """The smallest budget that the variant can be opened with."""
    max_context: int
    """Tokens of a sequence."""
    max_sequences: int
    budget: Budget | None
    reason: str | None = None
    """Why it cannot be taken. None: it can."""
    timing: TimingModel | NotMeasured | None = None
    """How long requests take on it, or why that is not known; None: it cannot be opened here."""
    draft: int = 0
    """Bytes that the model which drafts takes beside it; ``least`` has them, ``parts`` has not."""

    @property
    def fits(self) -> bool:
        return self.reason is None

    @property
    def peak(self) -> int:
        return self.parts.peak + self.draft


@dataclass(frozen=True)
class Plan:
    candidates: tuple[Candidate, ...]
    """Best device first."""
    choice: Candidate | None
    reason: str
    """Why it is the choice, or why there is none."""
    estimated: bool
    """The model is not here: sizes of files are estimated from its shape."""


def plan(store: Store, ref: str, device: str, size: BudgetSize | None, need: Need) -> Plan:
    """ModelNotFound where the model's shape is not to be had without a download; ConfigError for a use that makes no
    sense; UnknownReference, UnknownDevice, CorruptModel."""
    names = parse_device(device)
    package = store.present(ref)
    weights = None if need.weights == "auto" else need.weights
    models = _of_package(package, weights) if package is not None else _of_outline(store, ref, weights)
    architecture = next(iter(models.values())).architecture
    _check(need, architecture.max_context)
    drafts = _Drafts(store, need, ref, architecture.vocab_size)
    found = []
    budgets: dict[str, Budget | None] = {}
    """Of each piece of hardware: what is free changes while one looks."""
    for name in names:
        probed, hardware = probe_device(name), name.partition(":")[2]
        if len(names) > 1 and name in OPTIONAL and not probed.ready:
            continue
        if probed.ready and hardware not in budgets:
            budgets[hardware] = resolve(size, probed)
        budget = budgets.get(hardware) if probed.ready else None
        found += [
            replace(
                _candidate(probed, variant, model, budget, need, drafts),
                timing=_timing(store, package, variant, probed, need, size is not None) if probed.ready else None,
            )
            for variant, model in models.items()
            if model.engine == probed.engine
        ]
    choice, reason = _choose(store, ref, device, need, package, found)
    return Plan(tuple(found), choice, reason, package is None)


def refuse_early(store: Store, wish: Wish, size: BudgetSize | None, kv_type: KVWish | None) -> None:
    """BudgetError for a model that is not here yet and by its shape fits no device, so nobody waits for its export.

    Of a model that would have to be downloaded nothing is known; raises as :func:`plan` otherwise.
    """
    if wish.fallback or store.present(wish.ref) is not None:
        return
    try:
        found = plan(store, wish.ref, wish.device, size, Need(wish.weights, kv_type))
    except ModelNotFound:
        return
    least = [(each.least, each.budget) for each in found.candidates if each.budget is not None]
    if least and all(needed > budget.nbytes for needed, budget in least):
        raise BudgetError(found.reason)


def _of_package(package: Package, weights: Weights | None) -> dict[str, Model]:
    variants = package.manifest.variants
    found = {each.name: Model.of(package, each) for each in variants if weights in (None, each.weights)}
    if not found:
        there = ", ".join(each.name for each in variants)
        raise ModelNotFound(f"{package.name} is here without {weights} variants; it has: {there}")
    return found


def _of_outline(store: Store, ref: str, weights: Weights | None) -> dict[str, Model]:
    outline = store.outline(ref, weights or "int4")
    return {
        variant_name(engine, weights or "int4"): Model(outline.architecture, engine, weights or "int4", nbytes)
        for engine, nbytes in outline.nbytes.items()
    }


def _check(need: Need, max_context: int) -> None:
    for what, given, most in (("context", need.context, max_context), ("sequences", need.sequences, MOST_SEQUENCES)):
        if given is not None and not 1 <= given <= most:
            raise ConfigError(f"--{what} must be from 1 to {most}, not {given}")


class _Drafts:
    """What the model that drafts takes, by the engine that it runs on."""

    def __init__(self, store: Store, need: Need, ref: str, vocab_size: int) -> None:
        """ConfigError for another vocabulary; as :func:`plan` for what ``need.draft`` may be."""
        self._ref, self._device = need.draft, need.draft_device
        self._sizes: dict[Engine, int] = {}
        if need.draft is None:
            return
        package = store.present(need.draft)
        models = _of_outline(store, need.draft, None) if package is None else _of_package(package, None)
        for model in sorted(models.values(), key=lambda each: each.nbytes):  # as the smallest is opened
            if model.architecture.vocab_size != vocab_size:
                raise ConfigError(
                    f"{need.draft} cannot draft for {ref}: it has {model.architecture.vocab_size} tokens, not "
                    f"{vocab_size}; take a smaller model of the same family, or one pruned without vocab="
                )
            self._sizes.setdefault(model.engine, draft_bytes(model))

    def beside(self, device: Device) -> tuple[int, str | None]:
        """Bytes of the draft for a model on ``device``, and why it cannot be there, if it cannot."""
        if self._ref is None:
            return 0, None
        names = [device.name] if self._device is None else parse_device(self._device)
        for name in names:
            if KNOWN[name].engine in self._sizes:
                return self._sizes[KNOWN[name].engine], None
        return 0, f"{self._ref} has no variant for {' or '.join(names)} to draft there"


def _candidate(
    device: Device, variant: str, model: Model, budget: Budget | None, need: Need, drafts: _Drafts
) -> Candidate:
    context = model.architecture.max_context
    asked = need.context is not None or need.sequences is not None
    sequences = need.sequences or (1 if asked else DecoderOptions.max_sequences)
    each = need.context or context
    contexts = sequences if asked or (budget is not None and budget.asked) else 1
    use = Use(each * contexts, sequences, kv_type=need.kv_type, prefix_store=need.prefix_store)
    draft, no_draft = drafts.beside(device)
    reason = device.problem or no_draft
    if need.kv_type not in (None, "auto", *KV_TYPES[model.engine]):
        reason = f"it keeps keys and values as {' or '.join(KV_TYPES[model.engine])}, not {need.kv_type}"
        use = use._replace(kv_type=None)
    tokens = use.tokens
    if budget is not None and reason is None:
        tokens, use, reason = _within(budget, variant, model, use, asked, draft)
    return Candidate(
        device=device.name,
        variant=variant,
        parts=footprint(model, use._replace(tokens=tokens)),
        least=least_budget(model, use) + draft,
        max_context=min(each, tokens),
        max_sequences=sequences,
        budget=budget,
        reason=reason,
        draft=draft,
    )


def _timing(
    store: Store, package: Package | None, variant: str, device: Device, need: Need, budget: bool
) -> TimingModel | NotMeasured:
    """Of the model as :func:`edge_runtime.loading.load` would open it."""
    if package is None:
        return NotMeasured("the model is not here yet, so it was never measured")
    found = next(each for each in package.manifest.variants if each.name == variant)
    options, _ = tuned(
        DecoderOptions(kv_type=need.kv_type), device.name, found, need.workload, store.home, budget=budget
    )
    try:
        return timing_model(store.home, found, device.name, options)
    except NotMeasured as why:
        return why


def _within(
    budget: Budget, variant: str, model: Model, use: Use, asked: bool, draft: int
) -> tuple[int, Use, str | None]:
    """Tokens of KV cache beside the draft, with the prefix store or without it, and why not, if not."""
    left = budget.nbytes - draft
    needed = use.tokens if asked else tokens_needed(model, use)
    for kept in dict.fromkeys((use.prefix_store, False)):
        use = use._replace(prefix_store=kept)
        tokens = tokens_within(left, model, use)
        if tokens >= needed:
            return tokens, use, None
    least = footprint(model, use._replace(tokens=needed)).budget + draft
    drafting = f" and the draft ({format_bytes(draft)})" if draft else ""
    reason = f"{variant} needs {format_bytes(least)} with {needed} tokens of KV cache{drafting}, more than {budget}"
    if tokens >= tokens_needed(model, use):
        reason += f"; {tokens} tokens would fit"
    for kv_type in KV_TYPES[model.engine]:
        if footprint(model, use._replace(tokens=needed, kv_type=kv_type)).budget <= left:
            reason += f"; --kv-type {kv_type} would fit"
    return needed, use, reason


def _choose(
    store: Store, ref: str, device: str, need: Need, package: Package | None, found: list[Candidate]
) -> tuple[Candidate | None, str]:
    """As :class:`edge_runtime.EdgeLLM` would, among what fits the use."""
    fitting = {each.device for each in found if each.fits}
    if not found:
        return None, f"{ref} has no variant for {device}"
    if not fitting:
        why = "; ".join(f"{each.device}: {each.reason}" for each in found)
        least = min(found, key=lambda each: each.least)
        return None, f"{why}; the least budget that would do is {format_bytes(least.least)}, on {least.device}"
    first = next(each for each in found if each.fits)
    if package is None:
        return first, f"the first for {device} that fits; it would be exported first"
    out = {each.device: str(each.reason) for each in found if each.device not in fitting}
    weights = None if need.weights == "auto" else need.weights
    placed = place(store, Wish(ref, device, weights, need.workload), unfit=lambda package, names: out)
    preferred = [placed.variant.name]
    if need.weights == "auto":
        losses = Measurements(store.home.measurements, fingerprint()).losses(package.name)
        preferred = [each.name for each in rank(package.manifest.variants, losses)]
    there = {each.variant: each for each in found if each.device == placed.device.name and each.fits}
    return next((there[name] for name in preferred if name in there), first), placed.reason
