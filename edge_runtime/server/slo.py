"""GET /slo: which requests met the latency that their class wants."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from edge_runtime.server.context import ServerContext, json_response


async def slo(request: Request) -> Response:
    """Of each class that has a target, since the server has started; and the newest misses, with the reason of each."""
    return json_response(ServerContext.of(request).objectives.report())
