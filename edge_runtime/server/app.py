"""The ASGI application: routes, errors, and what stands before them."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route

from edge_runtime.errors import ConfigError, EdgeError
from edge_runtime.keys import KeyRing
from edge_runtime.server import ollama
from edge_runtime.server.chat import chat_completions
from edge_runtime.server.chat_deferred import delete_deferred, get_deferred
from edge_runtime.server.completions import completions
from edge_runtime.server.context import MIB, ServerContext
from edge_runtime.server.door import Door, Guard
from edge_runtime.server.embeddings import embeddings
from edge_runtime.server.errors import on_edge_error, on_http_error, on_unknown_error
from edge_runtime.server.metrics import Counting, Meter, metrics
from edge_runtime.server.models import get_model, health, list_models, live, stop_model
from edge_runtime.server.openapi import openapi
from edge_runtime.server.page import PARTS, page, part
from edge_runtime.server.responses import delete_response, get_response, responses
from edge_runtime.server.served import ServedEmbedder, ServedModel
from edge_runtime.server.shelf import Shelf
from edge_runtime.server.slo import slo
from edge_runtime.server.tokens import detokenize, tokenize
from edge_runtime.server.tracing import Tracing, traces
from edge_runtime.tracing.objectives import Objectives
from edge_runtime.tracing.recorder import Recorder

ROUTES = (
    Route("/v1/chat/completions", chat_completions, methods=["POST"]),
    Route("/v1/chat/completions/{id}", get_deferred, methods=["GET"]),
    Route("/v1/chat/completions/{id}", delete_deferred, methods=["DELETE"]),
    Route("/v1/completions", completions, methods=["POST"]),
    Route("/v1/responses", responses, methods=["POST"]),
    Route("/v1/responses/{id}", get_response, methods=["GET"]),
    Route("/v1/responses/{id}", delete_response, methods=["DELETE"]),
    Route("/v1/embeddings", embeddings, methods=["POST"]),
    Route("/tokenize", tokenize, methods=["POST"]),
    Route("/detokenize", detokenize, methods=["POST"]),
    Route("/api/chat", ollama.chat, methods=["POST"]),
    Route("/api/generate", ollama.generate, methods=["POST"]),
    Route("/api/embed", ollama.embed, methods=["POST"]),
    Route("/api/tags", ollama.tags, methods=["GET"]),
    Route("/api/show", ollama.show, methods=["POST"]),
    Route("/api/ps", ollama.ps, methods=["GET"]),
    Route("/api/version", ollama.their_version, methods=["GET"]),
    Route("/v1/models/stop", stop_model, methods=["POST"]),
    Route("/v1/models", list_models, methods=["GET"]),
    Route("/v1/models/{model:path}", get_model, methods=["GET"]),
    Route("/health", health, methods=["GET"]),
    Route("/health/ready", health, methods=["GET"]),
    Route("/health/live", live, methods=["GET"]),
    Route("/slo", slo, methods=["GET"]),
    Route("/metrics", metrics, methods=["GET"]),
    Route("/traces", traces, methods=["GET"]),
    Route("/openapi.json", openapi, methods=["GET"]),
    Route("/", page, methods=["GET"]),
    Route(f"{PARTS}{{file}}", part, methods=["GET"]),
)


def create_app(
    models: ServedModel | Sequence[ServedModel] | Shelf,
    *,
    embedders: Sequence[ServedEmbedder] = (),
    api_key: str | None = None,
    keys: KeyRing | None = None,
    per_minute: int | None = None,
    max_body: int = 8 * MIB,
    max_new_tokens: int | None = None,
    origins: Sequence[str] = (),
    memory_budget: int | None = None,
    recorder: Recorder | None = None,
) -> Starlette:
    """An application that serves ``models`` and ``embedders``, or a whole shelf; they stay the caller's to close.

    With ``api_key``, or as soon as there is one in ``keys``, everything but /health needs ``Authorization: Bearer
    <key>``. ``per_minute``: POSTs that each key, or without keys each address, may send; more get 429. Bodies over
    ``max_body`` bytes get 413. ``max_new_tokens``: what an answer may have at most. ``origins``: web pages that may ask
    (CORS), by scheme, host and port. ``memory_budget``: bytes that the process may take, for /metrics to tell.
    ``recorder``: keeps the newest requests' traces.

    ConfigError if two models have one name, the key is empty or not printable ASCII, or a limit is not positive.
    """
    if max_body < 1 or (max_new_tokens is not None and max_new_tokens < 1):
        raise ConfigError("limits of bodies and answers are at least 1")
    guard = Guard(api_key, keys, per_minute)
    meter = Meter()
    recorder = recorder or Recorder()
    objectives = Objectives(meter.objective)
    recorder.add(objectives)
    cors = [Middleware(CORSMiddleware, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"])]
    app = Starlette(
        routes=list(ROUTES),
        middleware=[
            Middleware(Tracing, recorder=recorder),
            Middleware(Counting, meter=meter),
            *(cors if origins else ()),
            Middleware(Door, guard=guard, origins=origins),
        ],
        exception_handlers={HTTPException: on_http_error, EdgeError: on_edge_error, Exception: on_unknown_error},
    )
    app.router.redirect_slashes = False
    shelf = models if isinstance(models, Shelf) else Shelf(models, embedders)
    app.state.context = ServerContext(shelf, guard, meter, max_body, recorder, objectives, max_new_tokens)
    meter.serve(shelf.open_texts, memory_budget)
    return app
