"""What the endpoint modules share: the models being served, how a body is read, what answers are made of."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from edge_runtime.errors import ConfigError, ModelNotFound
from edge_runtime.request import Usage
from edge_runtime.server.served import ServedModel
from edge_runtime.tools.pieces import whole

MIB = 2**20


@dataclass(frozen=True)
class ServerContext:
    """Held by the application as ``app.state.context``."""

    models: Mapping[str, ServedModel]
    max_body: int
    """Bytes."""
    api_key: str | None

    @classmethod
    def of(cls, request: Request) -> ServerContext:
        return cast(ServerContext, request.app.state.context)

    def model(self, name: str) -> ServedModel:
        """ModelNotFound names the models there are."""
        found = self.models.get(name)
        if found is None:
            raise ModelNotFound(f"the model {name[:200]!r} is not served here; there is {', '.join(self.models)}")
        return found


def by_name(models: ServedModel | Sequence[ServedModel]) -> dict[str, ServedModel]:
    """ConfigError if there is no model or a name comes twice."""
    several = models if isinstance(models, Sequence) else [models]
    named = {model.model_id: model for model in several}
    if not named or len(named) != len(several):
        raise ConfigError(f"serve at least one model, each under its own name, not {[m.model_id for m in several]}")
    return named


async def read_body(request: Request) -> bytes:
    """The whole body; 413 once it is over the limit, without reading on."""
    limit = ServerContext.of(request).max_body
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise _too_large(limit, int(declared))
    body = bytearray()
    try:
        async for piece in request.stream():
            body += piece
            if len(body) > limit:
                raise _too_large(limit, len(body))
    except ClientDisconnect as error:
        raise HTTPException(400, "the client left before it had sent the whole body") from error
    return bytes(body)


def _too_large(limit: int, size: int) -> HTTPException:
    detail = f"the body has {size} bytes or more; the limit is {limit}: send a shorter prompt"
    return HTTPException(413, detail, {"connection": "close"})


def json_response(payload: Any, headers: Mapping[str, str] | None = None) -> Response:
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


GONE = Response(status_code=499)
"""Nobody reads it: the client has left. 499 is what nginx logs for that."""
