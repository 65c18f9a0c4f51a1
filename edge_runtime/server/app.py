"""The ASGI application: routes, errors and the door.

No CORS header is ever sent, so a web page cannot read an answer; and without an API key, a web page's POST (browsers
name it by the ``Origin`` header) is refused, so that no page a user visits can put their machine to work.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from edge_runtime.errors import ConfigError, EdgeError
from edge_runtime.server.chat import chat_completions
from edge_runtime.server.chat_deferred import delete_deferred, get_deferred
from edge_runtime.server.completions import completions
from edge_runtime.server.context import MIB, ServerContext, by_name
from edge_runtime.server.errors import Failure, on_edge_error, on_http_error, on_unknown_error
from edge_runtime.server.models import get_model, health, list_models
from edge_runtime.server.served import ServedModel


def create_app(
    models: ServedModel | Sequence[ServedModel], *, api_key: str | None = None, max_body: int = 8 * MIB
) -> Starlette:
    """An application that serves ``models``, which stay the caller's to close.

    With ``api_key``, all of /v1 needs ``Authorization: Bearer <key>``. Bodies over ``max_body`` bytes get 413.
    ConfigError if two models have one name, or the key is empty or not printable ASCII.
    """
    if api_key is not None and not (api_key and api_key.isascii() and api_key.isprintable() and " " not in api_key):
        raise ConfigError("the API key must be printable ASCII without spaces, and not empty")
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", chat_completions, methods=["POST"]),
            Route("/v1/chat/completions/{id}", get_deferred, methods=["GET"]),
            Route("/v1/chat/completions/{id}", delete_deferred, methods=["DELETE"]),
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/models", list_models, methods=["GET"]),
            Route("/v1/models/{model:path}", get_model, methods=["GET"]),
            Route("/health", health, methods=["GET"]),
        ],
        middleware=[Middleware(_Door, api_key=api_key)],
        exception_handlers={HTTPException: on_http_error, EdgeError: on_edge_error, Exception: on_unknown_error},
    )
    app.router.redirect_slashes = False
    app.state.context = ServerContext(by_name(models), max_body, api_key)
    return app


class _Door:
    """Middleware: who may come in."""

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self._app = app
        self._expected = None if api_key is None else _digest(api_key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self._app(scope, receive, send)
            return
        headers = {"www-authenticate": "Bearer"} if refusal.status == 401 else None
        await refusal.response(headers)(scope, receive, send)

    def _refusal(self, scope: Scope) -> Failure | None:
        headers = Headers(scope=scope)
        if self._expected is None:
            if scope["method"] == "POST" and "origin" in headers:
                text = "requests from web pages (Origin header) need an API key: start the server with one"
                return Failure(403, text, "invalid_request_error", "forbidden")
            return None
        if scope["path"] == "/health":
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        given = given.strip() if scheme.lower() == "bearer" else ""
        # Digests have one length, so the comparison's time says nothing about the key, its length included.
        if hmac.compare_digest(_digest(given), self._expected):
            return None
        text = "the API key is wrong" if given else "an API key is needed: send Authorization: Bearer <key>"
        return Failure(401, text, "invalid_request_error", "invalid_api_key")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
