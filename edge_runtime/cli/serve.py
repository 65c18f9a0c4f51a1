"""``edge-glm serve``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack

import msgspec

from devices.encoder import DEVICES
from devices.host import host_memory
from edge_runtime.cli.progress import Bars
from edge_runtime.cli.run import open_model
from edge_runtime.embedder import EdgeEmbedder
from edge_runtime.errors import ConfigError, ModelNotFound, UnsupportedModel
from edge_runtime.keys import KeyRing
from edge_runtime.llm import EdgeLLM
from edge_runtime.memory import parse_budget, parse_bytes
from edge_runtime.paths import home
from edge_runtime.placement import Wish, place
from edge_runtime.settings import Settings, load_settings
from edge_runtime.store import Store

_NAMES = (
    *("device", "fallback", "weights", "workload", "memory_budget", "threads", "kv_type", "max_prompt"),
    *("batch_invariant", "prompt_lookup", "draft", "draft_device", "prefix_store", "tuning", "policy", "offline"),
    *("host", "port", "api_key", "allow_open", "rate_limit", "max_body", "max_new_tokens", "cors"),
)


def serve(arguments: argparse.Namespace) -> int:
    settings = load_settings({name: getattr(arguments, name) for name in _NAMES})
    refs = arguments.refs or [settings.model or only_model(Store(home()))]
    max_body = parse_bytes(settings.max_body)
    with ExitStack() as stack:
        models, embedders = _open(refs, settings, stack)
        from edge_runtime.server.app import create_app
        from edge_runtime.server.run import serve as serve_app

        app = create_app(
            models,
            embedders=embedders,
            api_key=settings.api_key,
            keys=KeyRing(home().keys),
            per_minute=settings.rate_limit,
            max_body=max_body,
            max_new_tokens=settings.max_new_tokens,
            origins=settings.origins,
        )
        serve_app(app, settings.host, settings.port, allow_open=settings.allow_open)
    return 0


def _open(refs: Sequence[str], settings: Settings, stack: ExitStack) -> tuple[list[EdgeLLM], list[EdgeEmbedder]]:
    """Encoders first, which take what they take; models that make text share what a budget leaves, in equal parts."""
    encoders = [ref for ref in refs if _is_encoder(ref, settings)]
    embedders = [stack.enter_context(_open_encoder(ref, settings)) for ref in encoders]
    texts = [ref for ref in refs if ref not in encoders]
    if len(texts) > 1 and settings.policy is not None:
        raise ConfigError("a policy is for one model that makes text; its tiers are the others")
    models = []
    for index, ref in enumerate(texts):
        own = settings
        if len(texts) > 1 and settings.memory_budget is not None:
            own = msgspec.structs.replace(settings, memory_budget=_part(settings.memory_budget, len(texts) - index))
        models.append(stack.enter_context(open_model(ref, own, "many")))
    return models, embedders


def _part(budget: str, sharing: int) -> str:
    """Up to where the process may grow with the next of so many models."""
    import psutil

    total = parse_budget(budget).within(lambda: host_memory().total)
    used = int(psutil.Process().memory_info().rss)
    return str(used + max(total - used, 0) // sharing)


def _is_encoder(ref: str, settings: Settings) -> bool:
    """Fetches what is not on this machine."""
    store = Store(home())
    package = store.present(ref)
    if package is None:
        try:
            store.outline(ref, "int4")
        except UnsupportedModel:
            return True  # or nothing that is known, which opening it says
        except ModelNotFound:
            with Bars() as bars:
                package = place(store, Wish(ref, settings.device, settings.format), bars).package
        else:
            return False
    return package.manifest.encoder is not None


def _open_encoder(ref: str, settings: Settings) -> EdgeEmbedder:
    device = settings.device if settings.device in DEVICES else "auto"
    weights = settings.format if settings.format in ("fp32", "fp16") else None
    with Bars() as bars:
        return EdgeEmbedder(
            ref, device, settings.memory_budget, weights=weights, threads=settings.threads, progress=bars
        )


def only_model(store: Store) -> str:
    models = store.list()
    if len(models) == 1:
        return str(models[0].folder)
    here = ", ".join(model.name for model in models) or "none"
    raise ConfigError(f"which model? name one: edge-glm serve REF (on this machine: {here})")
