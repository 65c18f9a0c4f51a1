"""GET /v1/models, /v1/models/{id}, POST /v1/models/stop and GET /health, /health/ready, /health/live."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from edge_runtime.server.context import ServerContext, json_response, read_body
from edge_runtime.server.served import ServedEmbedder, ServedModel
from edge_runtime.server.shelf import Place, Shelf
from edge_runtime.server.wire.parse import parse


async def list_models(request: Request) -> Response:
    shelf = ServerContext.of(request).shelf
    return json_response({"object": "list", "data": [_body(place, shelf) for place in shelf.places]})


async def get_model(request: Request) -> Response:
    shelf = ServerContext.of(request).shelf
    return json_response(_body(shelf.place(request.path_params["model"]), shelf))


class StopRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """POST /v1/models/stop."""

    model: str

    def check(self) -> None:
        pass


async def stop_model(request: Request) -> Response:
    """Close a model that was opened on demand, once nobody uses it; the next request opens it again."""
    body = parse(await read_body(request), StopRequest)
    stopped = await ServerContext.of(request).shelf.stop(body.model)
    return json_response({"model": body.model, "stopped": stopped})


async def health(request: Request) -> Response:
    """/health, /health/ready: 200 while every open model can answer, else 503; needs no API key."""
    shelf = ServerContext.of(request).shelf
    stopped = [place.name for place in shelf.places if place.model is not None and not place.model.ready]
    said = {place.name: _trouble(place.model) for place in shelf.places if place.model is not None}
    for name, model in shelf.open_texts():
        said[name] |= {} if model.tiers is None else model.tiers.health()
    said = {name: about for name, about in said.items() if about}
    status = {"status": "unavailable", "stopped": stopped} if stopped else {"status": "ok"}
    response = json_response(status | ({"models": said} if said else {}))
    response.status_code = 503 if stopped else 200
    return response


async def live(request: Request) -> Response:
    """What a watchdog restarts by: 503 once a model can answer no more until the process is started anew."""
    dead = dead_models(ServerContext.of(request).shelf)
    response = json_response({"status": "dead", "models": dead} if dead else {"status": "ok"})
    response.status_code = 503 if dead else 200
    return response


def dead_models(shelf: Shelf) -> dict[str, str]:
    """Open models that only a new process can help, and why."""
    models = [(place.name, place.model) for place in shelf.places if place.model is not None]
    return {name: model.condition.failure for name, model in models if model.condition.failure is not None}


def _trouble(model: ServedModel | ServedEmbedder) -> dict[str, Any]:
    """What an operator should know of it; nothing, if all is well."""
    return {name: value for name, value in msgspec.structs.asdict(model.condition).items() if value}


def _body(place: Place[ServedModel] | Place[ServedEmbedder], shelf: Shelf) -> dict[str, Any]:
    model = place.model
    return {
        "id": place.name,
        "object": "model",
        "created": place.created,
        "owned_by": "edge-glm",
        # ours; clients ignore what they do not know
        "kind": "embedding" if place.name in shelf.encoders else "text",
        # None: it is opened on demand
        "placement": None if model is None else dict(model.placement),
    }
