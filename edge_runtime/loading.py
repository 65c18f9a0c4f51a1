"""A model on one device: what is opened, and how its memory is shared out."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace

import msgspec

from devices.base import DecoderOptions
from devices.kv_types import KVWish
from devices.registry import open_decoder
from edge_runtime.budgets import share_out
from edge_runtime.constraints import Grammars
from edge_runtime.drafting.draft_model import DraftModel
from edge_runtime.drafting.opening import draft_bytes, open_draft, place_draft
from edge_runtime.engine import Engine, Successor
from edge_runtime.errors import NotMeasured
from edge_runtime.footprint import Model
from edge_runtime.heap import return_free_heap
from edge_runtime.measurements import Workload
from edge_runtime.memory import BudgetSize
from edge_runtime.placement import Placement
from edge_runtime.prefix_store import PrefixStore, fingerprint
from edge_runtime.step_watch import STEP_TIMEOUT_S
from edge_runtime.store import Store
from edge_runtime.template import ChatTemplate
from edge_runtime.tiers.local import LocalTier
from edge_runtime.timing.fitted import timing_model
from edge_runtime.timing.model import TimingModel
from edge_runtime.tokenizer import Tokenizer
from edge_runtime.tuning.apply import tuned
from edge_runtime.tuning.records import Options


class Loading(msgspec.Struct, frozen=True, kw_only=True):
    """How to load, on whatever device. See :class:`edge_runtime.EdgeLLM`."""

    budget: BudgetSize | None
    threads: int | None
    kv_type: KVWish | None
    max_sequences: int
    max_prompt: int | None
    batch_invariant: bool
    prompt_lookup: bool
    draft: str | None
    """The model that drafts."""
    draft_device: str | None
    """None: the model's."""
    prefix_cache_bytes: int | None
    prefix_store_bytes: int
    workload: Workload
    tuning: bool | Options
    step_timeout: float | None = STEP_TIMEOUT_S


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model open on a device."""

    placement: Placement
    device: str
    """``engine:device`` as really opened."""
    engine: Engine
    tier: LocalTier
    max_prompt: int
    """Tokens."""
    max_context: int
    """Tokens that prompt and answer may have together."""
    options: DecoderOptions
    """As it was opened."""
    timing: TimingModel | None = None
    """How long requests take on it, where that was measured here."""
    tuned: str | None = None
    """What ``edge-glm tune`` had found and was taken, in words."""

    @property
    def reason(self) -> str:
        """Why this device and variant, and what tuning found for them."""
        said = (self.placement.reason, self.placement.weights_reason, self.tuned)
        return "; ".join(each for each in said if each is not None)


def load(
    store: Store,
    placement: Placement,
    loading: Loading,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    grammars: Grammars,
    successor: Successor,
    sharing: int = 1,
) -> Loaded:
    """``sharing``: how many devices have the memory budget together, this one included, each an equal part.

    Raises CorruptModel, DeviceUnavailable, EngineError, BudgetError, ConfigError; then nothing stays open."""
    device, package, variant = placement.device, placement.package, placement.variant
    store.verify(package, variant)
    given = DecoderOptions(
        max_sequences=loading.max_sequences,
        threads=loading.threads,
        kv_type=loading.kv_type,
        max_prompt=loading.max_prompt,
        batch_invariant=loading.batch_invariant,
        cache_dir=store.home.compiled,
    )
    options, found = tuned(
        given, device.name, variant, loading.workload, store.home, loading.tuning, budget=loading.budget is not None
    )
    helper = None if loading.draft is None else place_draft(store, loading.draft, placement, loading.draft_device)
    kept = 0 if helper is None else draft_bytes(Model.of(helper.package, helper.variant))
    kv_tokens, store_bytes = share_out(
        loading.budget,
        device,
        package,
        variant,
        kv_type=options.kv_type,
        max_sequences=loading.max_sequences,
        chunk=options.prefill_chunk,
        store_bytes=loading.prefix_store_bytes,
        sharing=sharing,
        kept=kept,
    )
    options = replace(options, kv_tokens=kv_tokens)
    decoder = open_decoder(package.spec(variant), device.name, options)
    return_free_heap()  # reading the tokenizer and the model left some
    draft: DraftModel | None = None
    try:
        draft = None if helper is None else DraftModel(open_draft(store, helper, options))
        prefixes = None
        if store_bytes:
            identity = fingerprint(variant, decoder, options)
            prefixes = PrefixStore(store.prefixes(package.folder), identity, store_bytes, store.home.prefixes)
        engine = Engine(
            decoder,
            tokenizer,
            prefix_cache_bytes=loading.prefix_cache_bytes,
            prefix_store=prefixes,
            prompt_lookup=loading.prompt_lookup,
            draft=draft,
            grammars=grammars,
            batch_invariant=loading.batch_invariant,
            step_timeout=loading.step_timeout,
            successor=successor,
        )
    except BaseException:
        decoder.close()
        if draft is not None:
            draft.close()
        raise
    limits = decoder.limits
    context = limits.longest
    max_prompt = min(limits.max_prompt, context)
    tier = LocalTier(
        engine,
        tokenizer,
        template,
        max_prompt=max_prompt,
        max_context=context,
        add_bos=package.manifest.add_bos,
        defaults=package.generation,
    )
    timing: TimingModel | None = None
    with suppress(NotMeasured):
        timing = timing_model(store.home, variant, decoder.device, options)
    return Loaded(placement, decoder.device, engine, tier, max_prompt, context, options, timing, found)
