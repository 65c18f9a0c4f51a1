"""``edge-glm serve``."""

from __future__ import annotations

import argparse

from edge_runtime.cli.run import open_model
from edge_runtime.errors import ConfigError
from edge_runtime.paths import home
from edge_runtime.settings import load_settings
from edge_runtime.store import Store


def serve(arguments: argparse.Namespace) -> int:
    names = (
        "device",
        "fallback",
        "weights",
        "workload",
        "memory_budget",
        "threads",
        "kv_type",
        "max_prompt",
        "batch_invariant",
        "prompt_lookup",
        "draft",
        "draft_device",
        "prefix_store",
        "tuning",
        "policy",
        "offline",
        "host",
        "port",
        "api_key",
    )
    settings = load_settings({"model": arguments.ref, **{name: getattr(arguments, name) for name in names}})
    ref = settings.model or only_model(Store(home()))
    with open_model(ref, settings, "many") as llm:
        from edge_runtime.server.app import create_app
        from edge_runtime.server.run import serve as serve_app

        serve_app(create_app(llm, api_key=settings.api_key), settings.host, settings.port)
    return 0


def only_model(store: Store) -> str:
    models = store.list()
    if len(models) == 1:
        return str(models[0].folder)
    here = ", ".join(model.name for model in models) or "none"
    raise ConfigError(f"which model? name one: edge-glm serve REF (on this machine: {here})")
