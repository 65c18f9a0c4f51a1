"""GET / and its parts: a chat and a dashboard, from files that come along and from nowhere else."""

from __future__ import annotations

from functools import cache
from importlib import resources

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

PARTS = "/ui/"
"""Where scripts and styles are."""
_TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
_HEADERS = {
    "content-security-policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


async def page(request: Request) -> Response:
    return _answer("index.html")


async def part(request: Request) -> Response:
    return _answer(request.path_params["file"])


def _answer(name: str) -> Response:
    found = _files().get(name)
    if found is None:
        raise HTTPException(404)
    return Response(found, headers=_HEADERS, media_type=f"{_TYPES[name.rsplit('.', 1)[1]]}; charset=utf-8")


@cache
def _files() -> dict[str, bytes]:
    folder = resources.files("edge_runtime.server").joinpath("web")
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name.rsplit(".", 1)[-1] in _TYPES}
