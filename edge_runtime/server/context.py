"""What the endpoint modules share: the models being served, how a body is read, what answers are made of."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import anyio
import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from edge_runtime.errors import InvalidRequest
from edge_runtime.request import Usage
from edge_runtime.sampling import SamplingParams
from edge_runtime.server.door import Guard
from edge_runtime.server.errors import CLIENT_LEFT
from edge_runtime.server.metrics import Meter
from edge_runtime.server.response_store import ResponseStore
from edge_runtime.server.shelf import Shelf
from edge_runtime.tools.pieces import whole
from edge_runtime.tracing.objectives import Objectives
from edge_runtime.tracing.recorder import Recorder
from edge_runtime.tracing.trace import span

MIB = 2**20
EMBEDDING_AT_ONCE = 16
"""Requests. Each keeps one of the 40 threads of anyio's until all its texts are embedded, a batch after the other; with
all 40 of them no other request could even be begun."""
BODY_SECONDS = 60.0
"""That a client has for sending a body."""


@dataclass(frozen=True)
class ServerContext:
    """Held by the application as ``app.state.context``."""

    shelf: Shelf
    guard: Guard
    meter: Meter
    max_body: int
    """Bytes."""
    recorder: Recorder
    objectives: Objectives
    max_new_tokens: int | None
    """What an answer may have at most; None: what the context has room for."""
    responses: ResponseStore = field(default_factory=ResponseStore)
    embedding: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(EMBEDDING_AT_ONCE))
    """Held by requests whose texts are being embedded."""

    @classmethod
    def of(cls, request: Request) -> ServerContext:
        return cast(ServerContext, request.app.state.context)

    def bounded(self, params: SamplingParams, name: str = "max_tokens") -> SamplingParams:
        """With no more tokens than an answer may have. InvalidRequest if more were asked for, in ``name``."""
        limit = self.max_new_tokens
        if limit is None or (params.max_tokens is not None and params.max_tokens <= limit):
            return params
        if params.max_tokens is not None:
            raise InvalidRequest(f"{name} is {params.max_tokens}; this server makes answers of {limit} at most", name)
        return replace(params, max_tokens=limit)


def caller(request: Request) -> str:
    """Whose key the request has; "" where none is needed."""
    return getattr(request.state, "caller", "")


async def read_body(request: Request) -> bytes:
    """The whole body; 413 once it is over the limit, without reading on."""
    limit = ServerContext.of(request).max_body
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise _too_large(limit, int(declared))
    body = bytearray()
    try:
        with span("receive"), anyio.fail_after(BODY_SECONDS):
            async for piece in request.stream():
                body += piece
                if len(body) > limit:
                    raise _too_large(limit, len(body))
    except TimeoutError as error:
        text = f"the body took more than {BODY_SECONDS:g} s to come"
        raise HTTPException(408, text, {"connection": "close"}) from error
    except ClientDisconnect as error:
        raise HTTPException(CLIENT_LEFT, "the client left before it had sent the whole body") from error
    return bytes(body)


def _too_large(limit: int, size: int) -> HTTPException:
    detail = f"the body has {size} bytes or more; the limit is {limit}: send a shorter prompt"
    return HTTPException(413, detail, {"connection": "close"})


def json_response(payload: Any, headers: Mapping[str, str] | None = None) -> Response:
    with span("serialize"):
        return Response(msgspec.json.encode(payload), headers=headers, media_type="application/json")


def head(prefix: str, kind: str, model_id: str) -> dict[str, Any]:
    """What every answer, and every event of a stream, begins with."""
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model_id}


def usage_body(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def message_body(text: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
    """A whole message of the assistant; ``calls``: of tools, in pieces that have been joined."""
    if not calls:
        return {"role": "assistant", "content": text, "refusal": None}
    return {"role": "assistant", "content": text or None, "refusal": None, "tool_calls": whole(calls)}


GONE = Response(status_code=CLIENT_LEFT)
"""Nobody reads it."""
