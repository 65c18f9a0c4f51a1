"""Opens the model that drafts for another, within the same budget."""

from __future__ import annotations

from dataclasses import replace

from devices.base import Decoder, DecoderOptions
from devices.registry import open_decoder
from edge_runtime.errors import ConfigError
from edge_runtime.footprint import Model, Use, footprint
from edge_runtime.package import ArchitectureSummary
from edge_runtime.placement import Placement, Wish, place
from edge_runtime.store import Store
from edge_runtime.tokenizer import Tokenizer

DRAFT_TOKENS = 4096
"""Of KV cache, over all sequences: what finds no place there goes without drafts."""


def place_draft(store: Store, reference: str, model: Placement, device: str | None) -> Placement:
    """``device`` None: the model's. ConfigError for a vocabulary other than the model's; as :func:`placement.place`."""
    placed = place(store, Wish(reference, device or model.device.name, None))
    ours, theirs = (Tokenizer.from_folder(each.package.folder) for each in (placed, model))
    same = ours.vocab_size == theirs.vocab_size and all(
        ours.id_to_token(token) == theirs.id_to_token(token) for token in range(ours.vocab_size)
    )
    if not same:
        raise ConfigError(
            f"{placed.package.name} cannot draft for {model.package.name}: their vocabularies differ; take a smaller "
            "model of the same family, or one pruned without vocab="
        )
    return placed


def _tokens(architecture: ArchitectureSummary) -> int:
    return min(DRAFT_TOKENS, architecture.max_context)


def draft_bytes(draft: Model) -> int:
    """What it takes beside the model."""
    parts = footprint(draft, Use(_tokens(draft.architecture), prefix_store=False))
    return parts.weights + parts.kv + parts.activations


def open_draft(store: Store, placed: Placement, options: DecoderOptions) -> Decoder:
    """With the model's options. CorruptModel, DeviceUnavailable, EngineError."""
    store.verify(placed.package, placed.variant)
    own = replace(options, kv_tokens=_tokens(placed.package.manifest.architecture))
    return open_decoder(placed.package.spec(placed.variant), placed.device.name, own)
