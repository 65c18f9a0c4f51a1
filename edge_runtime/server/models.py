"""GET /v1/models, /v1/models/{id} and /health, /health/ready, /health/live."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from edge_runtime.server.context import ServerContext, json_response
from edge_runtime.server.served import ServedEmbedder, ServedModel


async def list_models(request: Request) -> Response:
    return json_response({"object": "list", "data": [_body(model) for model in ServerContext.of(request).served]})


async def get_model(request: Request) -> Response:
    context, name = ServerContext.of(request), request.path_params["model"]
    return json_response(_body(context.embedders[name] if name in context.embedders else context.model(name)))


async def health(request: Request) -> Response:
    """/health, /health/ready: 200 while every model can answer, else 503; needs no API key."""
    context = ServerContext.of(request)
    models = context.models
    stopped = [model.model_id for model in context.served if not model.ready]
    said = {name: dict(model.tiers.health()) for name, model in models.items() if model.tiers is not None}
    status = {"status": "unavailable", "stopped": stopped} if stopped else {"status": "ok"}
    response = json_response(status | ({"models": said} if said else {}))
    response.status_code = 503 if stopped else 200
    return response


async def live(request: Request) -> Response:
    """200 as long as the process answers at all: what a watchdog restarts by."""
    return json_response({"status": "ok"})


def _body(model: ServedModel | ServedEmbedder) -> dict[str, Any]:
    return {
        "id": model.model_id,
        "object": "model",
        "created": model.created,
        "owned_by": "edge-glm",
        "placement": dict(model.placement),  # ours; clients ignore what they do not know
    }
