"""OpenAI error bodies: ``{"error": {"message", "type", "param", "code"}}``, from the error tree, in one place."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from edge_runtime.errors import (
    BudgetError,
    ContextOverflow,
    EdgeError,
    EngineStopped,
    LedgerError,
    ModelNotFound,
    OutOfKVCache,
    OutOfSequences,
    Overloaded,
    PromptTooLong,
    RequestError,
    TierError,
    TierRefused,
    TierUnavailable,
)

CLIENT_LEFT = 499
"""The status, as nginx logs it, of a request whose client has left before anything was sent."""
_log = logging.getLogger("edge_glm.server")


@dataclass(frozen=True)
class Failure:
    """An error as the client sees it."""

    status: int
    message: str
    kind: str
    code: str | None = None
    param: str | None = None
    retry_after: int | None = None
    """Seconds after which trying again makes sense."""

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self, headers: Mapping[str, str] | None = None) -> Response:
        extra = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        return Response(
            msgspec.json.encode(self.body()), self.status, {**(headers or {}), **extra}, media_type="application/json"
        )


_TABLE: tuple[tuple[type[EdgeError], int, str | None], ...] = (
    # the first row that fits; rows above are more special
    (PromptTooLong, 400, "context_length_exceeded"),
    (ContextOverflow, 400, "context_length_exceeded"),
    (RequestError, 400, None),
    (ModelNotFound, 404, "model_not_found"),
    (Overloaded, 503, "overloaded"),
    (OutOfKVCache, 503, "overloaded"),
    (OutOfSequences, 503, "overloaded"),
    (BudgetError, 503, "out_of_memory_budget"),
    (EngineStopped, 503, "engine_stopped"),
    (TierUnavailable, 503, "tier_unavailable"),
    (TierRefused, 400, "tier_refused"),
    (TierError, 502, "tier_failed"),
    (LedgerError, 503, "ledger_unavailable"),
    (EdgeError, 500, None),
)


def status_of(error: Exception) -> int:
    """What the client is told; under 500 it is the request's own fault."""
    return next((status for kind, status, _ in _TABLE if isinstance(error, kind)), 500)


def failure_of(error: Exception) -> Failure:
    """The client's view of ``error``. What is not in the tree is a bug: it is logged, and the client learns no more."""
    row = next((row for row in _TABLE if isinstance(error, row[0])), None)
    if row is None:
        _log.error("internal error", exc_info=error)
        return _BUG
    _, status, code = row
    retry_after = None
    if code == "overloaded":
        retry_after = max(1, math.ceil(error.retry_after if isinstance(error, Overloaded) else 1.0))
    if status == 500:
        _log.error("request failed: %s", error, exc_info=error)
    param = error.param if isinstance(error, RequestError) else "model" if status == 404 else None
    return Failure(status, str(error), _kind(status), code, param, retry_after)


_BUG = Failure(500, "internal error: the server's log has the details", "server_error")


def _kind(status: int) -> str:
    return "invalid_request_error" if status < 500 else "server_error"


_HTTP_CODES: Mapping[int, str] = {401: "invalid_api_key", 403: "forbidden", 404: "not_found", 405: "method_not_allowed"}


async def on_edge_error(request: Request, error: Exception) -> Response:
    return failure_of(error).response()


async def on_http_error(request: Request, error: Exception) -> Response:
    """Starlette's own refusals (no such path, wrong method) and ours that exist only in HTTP (401, 403, 413)."""
    assert isinstance(error, HTTPException)
    message, path = error.detail, request.url.path[:200]
    if error.status_code == 404:
        known = "/v1/models, /v1/chat/completions, /v1/responses, /v1/completions, /api/chat, /health"
        message = f"there is no {path} here; see {known}" if error.detail == "Not Found" else error.detail
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        message = f"{path} does not take {request.method[:20]}; use {allowed}"
    code = _HTTP_CODES.get(error.status_code, "request_too_large" if error.status_code == 413 else None)
    return Failure(error.status_code, message, _kind(error.status_code), code).response(error.headers)


async def on_unknown_error(request: Request, error: Exception) -> Response:
    """A bug. Starlette raises it again after the answer is sent, so that uvicorn logs it."""
    return _BUG.response()
