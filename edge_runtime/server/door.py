"""Who may come in, and how often.

No CORS header is sent unless an origin is allowed by name, so a web page cannot read an answer; and without an API key,
a web page's POST (browsers name it by the ``Origin`` header) is refused, so that no page a user visits can put their
machine to work. Nor does a page get in by a name of its own that resolves to this machine (DNS rebinding): its requests
say that name (``Host``), and a server that listens on loopback without a key is asked by loopback's names only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from edge_runtime.errors import ConfigError, EdgeError
from edge_runtime.keys import Key, KeyRing, digest, find
from edge_runtime.server.errors import Failure, failure_of
from edge_runtime.server.page import PARTS
from edge_runtime.server.rate import RateLimit

OPEN = ("/", "/health", "/health/live", "/health/ready")
"""Paths that need no key: what watches a service has none, and the page asks for it by itself."""


class Guard:
    """The keys that there are, and how many requests a caller may send."""

    def __init__(self, api_key: str | None = None, ring: KeyRing | None = None, per_minute: int | None = None) -> None:
        """``api_key``: one more, that is kept nowhere. ConfigError if it is empty or not printable ASCII."""
        if api_key is not None and not (api_key and api_key.isascii() and api_key.isprintable() and " " not in api_key):
            raise ConfigError("the API key must be printable ASCII without spaces, and not empty")
        if per_minute is not None and per_minute < 1:
            raise ConfigError(f"a rate limit is at least one request a minute, not {per_minute}")
        self._own = () if api_key is None else (Key("--api-key", digest(api_key), 0),)
        self._ring = ring
        self._per_minute = per_minute
        self.loopback_only = False
        """Whether whoever asks without a key must have asked for this machine; set where it listens on loopback."""
        self._rate = RateLimit()

    @property
    def closed(self) -> bool:
        """Whether a key is needed. StorageError if that cannot be told."""
        return bool(self._own or (self._ring is not None and self._ring.keys))

    def key_of(self, given: str) -> Key | None:
        return find((*self._own, *(() if self._ring is None else self._ring.keys)), given)

    def wait(self, caller: str, key: Key | None) -> float:
        """Seconds until the caller may ask again; 0: now."""
        limit = self._per_minute if key is None or key.per_minute is None else key.per_minute
        return 0.0 if limit is None else self._rate.take(caller, limit)


class Door:
    """Middleware."""

    def __init__(self, app: ASGIApp, guard: Guard, origins: Sequence[str] = ()) -> None:
        """``origins``: web pages of these may ask without a key too."""
        self._app = app
        self._guard = guard
        self._origins = frozenset(origins)
        self._hosts = frozenset(_name(origin.rpartition("//")[2]) for origin in origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self._app(scope, receive, send)
            return
        headers = {"www-authenticate": "Bearer"} if refusal.status == 401 else None
        await refusal.response(headers)(scope, receive, send)

    def _refusal(self, scope: Scope) -> Failure | None:
        try:
            return self._checked(scope)
        except EdgeError as error:  # keys that cannot be read let nobody in
            return failure_of(error)

    def _checked(self, scope: Scope) -> Failure | None:
        headers = Headers(scope=scope)
        key = None
        if self._guard.closed:
            if scope["path"] in OPEN or scope["path"].startswith(PARTS):
                return None
            scheme, _, given = headers.get("authorization", "").partition(" ")
            given = given.strip() if scheme.lower() == "bearer" else ""
            key = self._guard.key_of(given)
            if key is None:
                text = "the API key is wrong" if given else "an API key is needed: send Authorization: Bearer <key>"
                return Failure(401, text, "invalid_request_error", "invalid_api_key")
        elif self._guard.loopback_only and not self._is_ours(headers.get("host", "")):
            text = "this server answers at localhost: under another name (Host header) it needs an API key"
            return Failure(403, text, "invalid_request_error", "forbidden")
        elif scope["method"] == "POST" and headers.get("origin") not in (None, _own_origin(scope), *self._origins):
            text = "requests from web pages (Origin header) need an API key: start the server with one"
            return Failure(403, text, "invalid_request_error", "forbidden")
        if scope["method"] == "POST":
            client = scope.get("client") or ("", 0)
            seconds = self._guard.wait(f"address {client[0]}" if key is None else f"key {key.name}", key)
            if seconds > 0:
                wait = math.ceil(seconds)
                text = f"too many requests: try again in {wait} s"
                return Failure(429, text, "rate_limit_error", "rate_limit_exceeded", retry_after=wait)
        scope.setdefault("state", {})["caller"] = "" if key is None else key.name
        return None

    def _is_ours(self, host: str) -> bool:
        """Also a name of a page that may ask: a proxy in front may pass it on. Without one (HTTP/1.0) it is no
        browser."""
        return not host or _is_loopback(host) or _name(host) in self._hosts


def _own_origin(scope: Scope) -> str:
    """Of pages that this server serves itself. A name that resolves here but is not ours does not count: a page of
    another site could have it (DNS rebinding), so only loopback names do."""
    host = Headers(scope=scope).get("host", "")
    return f"{scope.get('scheme', 'http')}://{host}" if _is_loopback(host) else ""


def _is_loopback(host: str) -> bool:
    return _name(host) in ("127.0.0.1", "localhost", "[::1]")


def _name(host: str) -> str:
    """Without the port."""
    return (host if host.endswith("]") else host.rsplit(":", 1)[0]).lower()
