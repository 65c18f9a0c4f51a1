"""Where requests' time goes, as the server tells it: the middleware that traces them, Server-Timing, and /traces."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import anyio.to_thread
import msgspec
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edge_runtime.server.context import ServerContext, json_response
from edge_runtime.server.errors import CLIENT_LEFT
from edge_runtime.tracing.chrome import chrome_trace
from edge_runtime.tracing.context import trace_parent
from edge_runtime.tracing.recorder import Recorder
from edge_runtime.tracing.trace import Trace, current, enter, leave, span

ASKED = "x-edge-glm-timing"
"""A request that has this header is told its times: in Server-Timing, and before the end of an event stream in a
comment."""
MOST_TOLD = 100
_NO_TOKEN = re.compile(r"[^A-Za-z0-9!#$%&'*+.^_`|~-]")
"""What a name in that header may not have (RFC 9110)."""


class Tracing:
    """Middleware: every POST is traced, from its head to the last byte of its answer. What the door does not let in is
    not kept, or whoever has no key could drive out the others."""

    def __init__(self, app: ASGIApp, recorder: Recorder) -> None:
        self._app = app
        self._recorder = recorder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        trace = Trace(*trace_parent(headers.get("traceparent")))
        asked = _asks(headers)
        scope.setdefault("state", {})["timing"] = trace if asked else None
        token = enter(trace.lane("server"))

        async def timed(message: Message) -> None:
            if message["type"] == "http.response.start":
                trace.say(status=message["status"])
                if asked:
                    MutableHeaders(scope=message)["server-timing"] = server_timing(trace)
            with span("send"):
                await send(message)

        unsent = CLIENT_LEFT
        try:
            await self._app(scope, receive, timed)
        except BaseException:
            unsent = 500  # by who stands outside
            raise
        finally:
            lane = current()
            if lane is not None:
                lane.pause()
            leave(token)
            trace.finish()
            if "caller" in scope["state"]:
                trace.about.setdefault("status", unsent)
                # the route's pattern: paths may hold what clients make up
                trace.say(path=getattr(scope.get("route"), "path", None) or "other")
                self._recorder.keep(trace)


def _asks(headers: Mapping[str, str]) -> bool:
    return headers.get(ASKED, "").strip().lower() not in ("", "0", "false", "no")


def server_timing(trace: Trace) -> str:
    """The header of W3C's Server Timing, in milliseconds, of what has been done so far."""
    parts = [f"{_NO_TOKEN.sub('-', part)};dur={nanoseconds / 1e6:.3f}" for part, nanoseconds in trace.parts().items()]
    return ", ".join([*parts, f"total;dur={trace.wall / 1e6:.3f}"])


def timing_comment(scope: Scope) -> bytes:
    """Of an event stream whose reader asked for it, before its end; else nothing. Readers of events skip comments."""
    trace = scope.get("state", {}).get("timing")
    return b"" if trace is None else b": timing " + msgspec.json.encode(told(trace)["ms"]) + b"\n\n"


def told(trace: Trace) -> dict[str, Any]:
    """Without spans; times in milliseconds."""
    parts = {part: round(nanoseconds / 1e6, 3) for part, nanoseconds in trace.parts().items()}
    return {
        "id": trace.id,
        "started": trace.unix_ns / 1e9,
        **trace.about,
        "ms": {**parts, "total": round(trace.wall / 1e6, 3)},
        "covered": round(trace.covered, 4),
    }


_FORMS: Mapping[str, Callable[[list[Trace]], Response]] = {
    "json": lambda kept: json_response({"object": "list", "data": [told(each) for each in kept]}),
    "chrome": lambda kept: json_response(chrome_trace(kept)),
}


async def traces(request: Request) -> Response:
    """The newest requests that have ended, newest first; with ``?format=chrome`` the spans that are kept, for
    Perfetto."""
    recorder = ServerContext.of(request).recorder
    count = request.query_params.get("limit", str(MOST_TOLD))
    if not (count.isascii() and count.isdigit()):
        raise HTTPException(400, f"limit is a number of requests, not {count[:40]!r}")
    kept = recorder.ring.newest(int(count[:9]))
    form = request.query_params.get("format", "json")
    if form not in _FORMS:
        raise HTTPException(400, f"format is json or chrome, not {form[:40]!r}")
    return await anyio.to_thread.run_sync(_FORMS[form], kept)  # of all that is kept it takes a while
