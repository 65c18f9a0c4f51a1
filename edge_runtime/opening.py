"""Opens a model: on the first device that takes it, and so that another device or other weights can follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from edge_runtime.budgets import put_aside
from edge_runtime.constraints import Grammars
from edge_runtime.errors import ConfigError
from edge_runtime.exporting import Progress
from edge_runtime.failover import Failover
from edge_runtime.loading import Loading, load
from edge_runtime.machine import fingerprint
from edge_runtime.measurements import Measurements
from edge_runtime.package import Package, WeightsWish
from edge_runtime.placement import Placement, Wish, place
from edge_runtime.planning import refuse_early
from edge_runtime.store import Store
from edge_runtime.switching import Switching
from edge_runtime.template import ChatTemplate
from edge_runtime.tokenizer import Tokenizer
from edge_runtime.variants import Variants


@dataclass(frozen=True)
class Opened:
    failover: Failover
    switching: Switching
    tokenizer: Tokenizer
    chats: bool
    """It has a chat template."""


def open_model(
    store: Store,
    ref: str,
    device: str,
    weights: WeightsWish | None,
    fallback: bool,
    loading: Loading,
    progress: Progress | None = None,
) -> Opened:
    """See :class:`edge_runtime.EdgeLLM`, also for what is raised; then nothing stays open."""
    auto = weights == "auto"
    fixed = None if weights == "auto" else weights
    wish = Wish(ref, device, fixed, loading.workload, fallback)
    refuse_early(store, wish, loading.budget, loading.kv_type)
    unfit = partial(put_aside, weights=fixed, size=loading.budget, kv_type=loading.kv_type)
    kept = Measurements(store.home.measurements, fingerprint())
    variants = Variants(kept.losses, loading.budget, loading.kv_type, loading.max_sequences)

    def place_on(aside: Mapping[str, str], progress: Progress | None = None) -> Placement:
        placed = place(store, wish, progress, aside=aside, unfit=unfit)
        return variants.refine(placed) if auto else placed

    first = place_on({}, progress)
    if first.package.manifest.encoder is not None:
        raise ConfigError(f"{first.package.name} makes embeddings, no text: open it with EdgeEmbedder, or serve it")
    tokenizer = _tokenizer(first.package)
    template = ChatTemplate(first.package.chat_template, first.package.manifest.special_tokens)
    grammars = Grammars(tokenizer)
    failover = Failover(
        place=place_on,
        load=lambda placement, successor, sharing: load(
            store, placement, loading, tokenizer, template, grammars, successor, sharing
        ),
        first=first,
    )
    return Opened(failover, Switching(failover, variants, auto), tokenizer, template.source is not None)


def _tokenizer(package: Package) -> Tokenizer:
    manifest = package.manifest
    tokenizer = Tokenizer.from_folder(package.folder)
    tokenizer.eos_ids = manifest.eos_ids
    bos = manifest.special_tokens.get("bos_token")
    if bos is not None:
        tokenizer.bos_id = tokenizer.token_to_id(bos)
    return tokenizer
