"""``edge-glm serve``."""

from __future__ import annotations

import argparse
from contextlib import ExitStack, suppress

from devices.host import host_memory
from edge_runtime.cli.opening import offers, offers_elsewhere, open_served
from edge_runtime.embedder import EdgeEmbedder
from edge_runtime.errors import ConfigError
from edge_runtime.keys import KeyRing
from edge_runtime.llm import EdgeLLM
from edge_runtime.memory import parse_budget, parse_bytes
from edge_runtime.paths import home
from edge_runtime.server.signals import Terminated, termination_interrupts
from edge_runtime.server.wire.ollama import seconds_of
from edge_runtime.settings import load_settings
from edge_runtime.store import Store
from edge_runtime.tracing.otel import OtelSink
from edge_runtime.tracing.recorder import Recorder, Sink

_NAMES = (
    *("device", "fallback", "weights", "workload", "memory_budget", "threads", "kv_type", "max_prompt"),
    *("batch_invariant", "prompt_lookup", "draft", "draft_device", "prefix_store", "tuning", "policy", "offline"),
    *("host", "port", "api_key", "allow_open", "rate_limit", "max_body", "max_new_tokens", "cors"),
    *("keep_alive", "on_demand", "also_on", "otel", "step_timeout"),
)


def serve(arguments: argparse.Namespace) -> int:
    with suppress(Terminated), termination_interrupts():  # while models are loaded, too
        _serve(arguments)
    return 0


def _serve(arguments: argparse.Namespace) -> None:
    settings = load_settings({name: getattr(arguments, name) for name in _NAMES})
    refs = arguments.refs or ([settings.model] if settings.model else [])
    store = Store(home())
    if not refs and len(store.list()) < 2:  # of several none is opened before somebody asks for it
        refs = [only_model(store)]
    max_body = parse_bytes(settings.max_body)
    keep_alive = seconds_of(settings.keep_alive)
    given = settings.memory_budget
    budget = None if given is None else parse_budget(given).within(lambda: host_memory().total)
    with ExitStack() as stack:
        sinks: list[Sink] = []
        if settings.otel:  # before models are fetched and opened: it may not be installed
            sink = OtelSink()
            stack.callback(sink.close)
            sinks.append(sink)
        models, embedders = open_served(refs, settings, stack)
        from edge_runtime.server.app import create_app
        from edge_runtime.server.run import serve as serve_app
        from edge_runtime.server.shelf import KEEP_ALIVE, Shelf

        opened: list[EdgeLLM | EdgeEmbedder] = [*models.values(), *embedders.values()]
        texts, encoders = offers(settings, opened) if settings.on_demand or not refs else ({}, {})
        texts |= offers_elsewhere(models, settings)
        shelf = Shelf(
            list(models.values()),
            list(embedders.values()),
            texts,
            encoders,
            KEEP_ALIVE if keep_alive is None else keep_alive,
        )
        stack.callback(shelf.close)
        app = create_app(
            shelf,
            api_key=settings.api_key,
            keys=KeyRing(home().keys),
            per_minute=settings.rate_limit,
            max_body=max_body,
            max_new_tokens=settings.max_new_tokens,
            origins=settings.origins,
            memory_budget=budget,
            recorder=Recorder(sinks),
        )
        serve_app(app, settings.host, settings.port, allow_open=settings.allow_open)


def only_model(store: Store) -> str:
    """ConfigError if there is another number of them than one."""
    models = store.list()
    if len(models) == 1:
        return str(models[0].folder)
    here = ", ".join(model.name for model in models) or "none"
    raise ConfigError(f"which model? name one: edge-glm serve REF (on this machine: {here})")
