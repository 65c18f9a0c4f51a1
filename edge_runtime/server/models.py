"""GET /v1/models, /v1/models/{id} and /health."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from edge_runtime.server.context import ServerContext, json_response
from edge_runtime.server.served import ServedModel


async def list_models(request: Request) -> Response:
    models = ServerContext.of(request).models.values()
    return json_response({"object": "list", "data": [_body(model) for model in models]})


async def get_model(request: Request) -> Response:
    return json_response(_body(ServerContext.of(request).model(request.path_params["model"])))


async def health(request: Request) -> Response:
    """200 while every model can answer, else 503; needs no API key."""
    models = ServerContext.of(request).models
    stopped = [name for name, model in models.items() if not model.ready]
    said = {name: dict(model.tiers.health()) for name, model in models.items() if model.tiers is not None}
    status = {"status": "unavailable", "stopped": stopped} if stopped else {"status": "ok"}
    response = json_response(status | ({"models": said} if said else {}))
    response.status_code = 503 if stopped else 200
    return response


def _body(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.model_id,
        "object": "model",
        "created": model.created,
        "owned_by": "edge-glm",
        "placement": dict(model.placement),  # ours; clients ignore what they do not know
    }
