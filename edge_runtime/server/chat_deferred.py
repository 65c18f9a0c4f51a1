"""Chats that are answered later: 202 with an id, and GET and DELETE /v1/chat/completions/{id}.

The answer has OpenAI's form all along, so that its own clients read it (``client.chat.completions.retrieve``): without
choices as long as it waits, and ``edge_glm.status`` says how things stand.
"""

from __future__ import annotations

from typing import Any

import anyio.to_thread
import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from edge_runtime.deferred.deferrals import Ticket
from edge_runtime.errors import InvalidRequest
from edge_runtime.prompts import TierRequest
from edge_runtime.server.context import ServerContext, json_response, message_body, usage_body
from edge_runtime.server.errors import Failure
from edge_runtime.server.served import ServedModel, Tiers


def defer(tiers: Tiers, request: TierRequest, stream: bool) -> Ticket | None:
    """Put it into the queue, if it is one to be answered later."""
    if not tiers.defers(request):
        return None
    if stream:
        raise InvalidRequest("a request that is answered later cannot stream: leave stream out", "stream")
    return tiers.deferrals.get(tiers.deferrals.add(request))


def deferred_response(ticket: Ticket, model_id: str, status: int) -> Response:
    if ticket.failure is not None:
        failure = ticket.failure
        kind = "invalid_request_error" if failure.status < 500 else "server_error"
        return Failure(failure.status, failure.error, kind, "deferred_failed").response()
    answer = ticket.answer
    state = {"status": ticket.state} | ({} if ticket.waits_for is None else {"waits_for": ticket.waits_for})
    body: dict[str, Any] = {
        "id": ticket.id,
        "object": "chat.completion",
        "created": int(ticket.created),
        "model": model_id,
        "service_tier": "flex",
        "choices": [],
        "edge_glm": state,
    }
    headers = {"location": f"/v1/chat/completions/{ticket.id}"} if status == 202 else {}
    if answer is not None:
        headers = answer.headers
        body["usage"] = usage_body(answer.usage)
        for index, choice in enumerate(answer.choices):
            message = message_body(choice.text, choice.tool_calls)
            reason = choice.finish_reason
            body["choices"].append({"index": index, "message": message, "logprobs": None, "finish_reason": reason})
    response = json_response(body, headers)
    response.status_code = status
    return response


async def get_deferred(request: Request) -> Response:
    model, ticket = await anyio.to_thread.run_sync(_find, request)
    return deferred_response(ticket, model.model_id, 200)


async def delete_deferred(request: Request) -> Response:
    model, ticket = await anyio.to_thread.run_sync(_find, request)
    assert model.tiers is not None
    await anyio.to_thread.run_sync(model.tiers.deferrals.remove, ticket.id)
    body = {"id": ticket.id, "object": "chat.completion.deleted", "deleted": True}
    return Response(msgspec.json.encode(body), media_type="application/json")


def _find(request: Request) -> tuple[ServedModel, Ticket]:
    name = request.path_params["id"]
    for _, model in ServerContext.of(request).shelf.open_texts():
        found = None if model.tiers is None else model.tiers.deferrals.get(name)
        if found is not None:
            return model, found
    raise HTTPException(404, f"there is no deferred request {name[:80]!r}")
