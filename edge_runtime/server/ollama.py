"""Ollama's API over the models here: /api/chat, /api/generate, /api/embed, /api/tags, /api/show,
/api/ps and /api/version.

Answers stream as lines of JSON unless ``stream`` is false, times are nanoseconds, errors are ``{"error": text}``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from functools import partial, wraps
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from edge_runtime.errors import EdgeError
from edge_runtime.model_facts import ModelFacts
from edge_runtime.prompts import About
from edge_runtime.request import Chunk
from edge_runtime.server.context import GONE, ServerContext, json_response, read_body
from edge_runtime.server.embeddings import check_dimensions, embedded
from edge_runtime.server.errors import Failure, failure_of
from edge_runtime.server.running import Running, Start
from edge_runtime.server.served import ServedEmbedder, ServedModel
from edge_runtime.server.shelf import FOREVER, Lease, Place
from edge_runtime.server.sse import EventStream, Write
from edge_runtime.server.wire.ollama import OllamaChat, OllamaEmbed, OllamaGenerate, OllamaShow, seconds_of
from edge_runtime.server.wire.parse import parse
from edge_runtime.server.wire.sampling import about_of
from edge_runtime.tools.pieces import add_call, whole
from edge_runtime.version import version

VERSION = "0.12.0"
"""Of Ollama's API that this is; clients ask before they use what is newer."""
_LINES = "application/x-ndjson"
Endpoint = Callable[[Request], Awaitable[ASGIApp]]


def _theirs(endpoint: Endpoint) -> Endpoint:
    """With errors as Ollama's clients read them."""

    @wraps(endpoint)
    async def answer(request: Request) -> ASGIApp:
        try:
            return await endpoint(request)
        except EdgeError as error:
            failure = failure_of(error)
            headers = {} if failure.retry_after is None else {"retry-after": str(failure.retry_after)}
            return _error(failure.message, failure.status, headers)
        except HTTPException as error:
            return _error(error.detail, error.status_code, dict(error.headers or {}))

    return answer


def _error(message: str, status: int, headers: dict[str, str]) -> Response:
    return Response(msgspec.json.encode({"error": message}), status, headers, media_type="application/json")


@_theirs
async def chat(request: Request) -> ASGIApp:
    body = parse(await read_body(request), OllamaChat)
    context = ServerContext.of(request)
    async with await context.shelf.text(_name(body.model, context)) as lease:
        model = lease.model
        lease.keep_alive(body.seconds)
        if not body.messages:  # Ollama's way to load a model before it is needed
            return json_response(_Answer(model, "message").loaded())
        params = context.bounded(body.params(), "options.num_predict")
        about = about_of(request.headers, None, {}, body.tool_fields())
        start = partial(model.start_chat, body.plain(), params, about)
        return await _answered(request, context, lease, start, "message", body.stream)


@_theirs
async def generate(request: Request) -> ASGIApp:
    body = parse(await read_body(request), OllamaGenerate)
    context = ServerContext.of(request)
    async with await context.shelf.text(_name(body.model, context)) as lease:
        model = lease.model
        lease.keep_alive(body.seconds)
        if not body.prompt:
            return json_response(_Answer(model, "response").loaded())
        params = context.bounded(body.params(), "options.num_predict")
        about: About = about_of(request.headers, None, {}, {})
        if body.raw or not model.facts.template:
            start: Start = partial(model.start_completion, body.prompt, params, about)
        else:
            start = partial(model.start_chat, body.messages(), params, about)
        return await _answered(request, context, lease, start, "response", body.stream)


async def _answered(
    request: Request, context: ServerContext, lease: Lease[ServedModel], start: Start, kind: str, stream: bool
) -> ASGIApp:
    model = lease.model
    running = Running([start], context.meter.watch(model.model_id))
    answer = _Answer(model, kind)
    if stream:
        await running.__aenter__()
        running.release_with(lease.keep())
        produce = partial(_stream, answer=answer)
        return EventStream(running, produce, end=b"", failed=_failed_line, media_type=_LINES)
    if not await running.finish(request.receive, answer.add):
        return GONE
    return json_response(answer.whole(running), running.route.headers())


async def _stream(running: Running, write: Write, *, answer: _Answer) -> None:
    async def emit(number: int, chunk: Chunk) -> None:
        await answer.add(number, chunk)
        if chunk.text:
            await write(_line(answer.piece(chunk.text)))

    await running.pump(emit)
    await write(_line(answer.last(running)))


def _line(payload: Any) -> bytes:
    return msgspec.json.encode(payload) + b"\n"


def _failed_line(failure: Failure) -> bytes:
    return _line({"error": failure.message})


class _Answer:
    """``kind``: ``message`` of a chat, ``response`` of a prompt."""

    def __init__(self, model: ServedModel, kind: str) -> None:
        self._model = model
        self._kind = kind
        self._text: list[str] = []
        self._calls: list[dict[str, Any]] = []
        self._finish = ""
        self._started = time.perf_counter_ns()
        self._first: int | None = None

    async def add(self, number: int, chunk: Chunk) -> None:
        if self._first is None and (chunk.token_ids or chunk.text or chunk.extra):
            self._first = time.perf_counter_ns()
        self._text.append(chunk.text)
        for piece in (chunk.extra or {}).get("tool_calls", ()):
            add_call(self._calls, piece)
        if chunk.finish_reason is not None:
            self._finish = chunk.finish_reason

    def piece(self, text: str) -> dict[str, Any]:
        return {**self._head(), **self._said(text), "done": False}

    def last(self, running: Running) -> dict[str, Any]:
        """The end of a stream, with the calls, which Ollama does not stream."""
        return {**self._head(), **self._said("", self._made()), **self._end(running)}

    def whole(self, running: Running) -> dict[str, Any]:
        return {**self._head(), **self._said("".join(self._text), self._made()), **self._end(running)}

    def loaded(self) -> dict[str, Any]:
        return {**self._head(), **self._said(""), "done": True, "done_reason": "load"}

    def _head(self) -> dict[str, Any]:
        return {"model": self._model.model_id, "created_at": datetime.now(UTC).isoformat().replace("+00:00", "Z")}

    def _said(self, text: str, calls: list[dict[str, Any]] | None = None) -> dict[str, Any]:
        if self._kind == "response":
            return {"response": text}
        return {"message": {"role": "assistant", "content": text, **({"tool_calls": calls} if calls else {})}}

    def _made(self) -> list[dict[str, Any]]:
        return [_their_call(call) for call in whole(self._calls)]

    def _end(self, running: Running) -> dict[str, Any]:
        now, usage = time.perf_counter_ns(), running.usage()
        first = now if self._first is None else self._first
        return {
            "done": True,
            "done_reason": "length" if self._finish == "length" else "stop",
            "total_duration": now - self._started,
            "load_duration": 0,
            "prompt_eval_count": usage.prompt_tokens,
            "prompt_eval_duration": first - self._started,
            "eval_count": usage.completion_tokens,
            "eval_duration": now - first,
        }


def _their_call(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    try:
        arguments = json.loads(function.get("arguments") or "{}")
    except (ValueError, RecursionError):  # cut off, or nested without end
        arguments = {}
    return {"function": {"name": function["name"], "arguments": arguments}}


@_theirs
async def embed(request: Request) -> ASGIApp:
    """Long texts are cut unless ``truncate`` is false, as Ollama does."""
    body = parse(await read_body(request), OllamaEmbed)
    context = ServerContext.of(request)
    started = time.perf_counter_ns()
    async with await context.shelf.encoder(_name(body.model, context)) as lease:
        model = lease.model
        lease.keep_alive(seconds_of(body.keep_alive))
        check_dimensions(model, body.dimensions)
        texts = [body.input] if isinstance(body.input, str) else body.input
        found = await embedded(request, model, texts, truncate=body.truncate)
    if found is None:
        return GONE
    return json_response(
        {
            "model": model.model_id,
            "embeddings": [vector.tolist() for vector in found.vectors],
            "total_duration": time.perf_counter_ns() - started,
            "load_duration": 0,
            "prompt_eval_count": found.tokens,
        }
    )


# --- models -----------------------------------------------------------------------------------------------------------


@_theirs
async def tags(request: Request) -> ASGIApp:
    return json_response({"models": [_entry(place) for place in ServerContext.of(request).shelf.places]})


@_theirs
async def show(request: Request) -> ASGIApp:
    body = parse(await read_body(request), OllamaShow)
    context = ServerContext.of(request)
    place = context.shelf.place(_name(body.model or body.name, context))
    facts = place.facts
    architecture = facts.family
    capabilities = ["embedding"] if place.name in context.shelf.encoders else ["completion"]
    return json_response(
        {
            "license": facts.licence or "",
            "modelfile": "",
            "parameters": "",
            "template": facts.template or "",
            "details": _details(facts),
            "model_info": {
                "general.architecture": architecture,
                "general.parameter_count": facts.parameters,
                f"{architecture}.context_length": facts.context,
            },
            "capabilities": [*capabilities, *(["tools"] if facts.template else [])],
            "modified_at": _time(place.created),
        }
    )


@_theirs
async def ps(request: Request) -> ASGIApp:
    """Those that are open."""
    places = [place for place in ServerContext.of(request).shelf.places if place.model is not None]
    return json_response({"models": [_entry(place) | _open(place) for place in places]})


def _open(place: Place[ServedModel] | Place[ServedEmbedder]) -> dict[str, Any]:
    pinned = place.expires_in == FOREVER
    expires = "9999-12-31T23:59:59Z" if pinned else _time(time.time() + place.expires_in)
    assert place.model is not None
    ours = {"device": place.model.placement["device"], "pinned": pinned, "users": place.users}
    return {"expires_at": expires, "size_vram": 0, "context_length": place.facts.context, "edge_glm": ours}


async def their_version(request: Request) -> Response:
    return json_response({"version": VERSION, "edge_glm": version()})


def _name(given: str, context: ServerContext) -> str:
    """Ollama's clients may add a tag."""
    bare, known = given.removesuffix(":latest"), context.shelf.names
    return bare if given not in known and bare in known else given


def _entry(place: Place[ServedModel] | Place[ServedEmbedder]) -> dict[str, Any]:
    return {
        "name": place.name,
        "model": place.name,
        "modified_at": _time(place.created),
        "size": place.facts.nbytes,
        "digest": place.facts.digest,
        "details": _details(place.facts),
    }


def _details(facts: ModelFacts) -> dict[str, Any]:
    millions = facts.parameters / 1e6
    return {
        "parent_model": "",
        "format": "edge-glm",
        "family": facts.family,
        "families": [facts.family],
        "parameter_size": f"{millions / 1000:.1f}B" if millions >= 1000 else f"{millions:.0f}M",
        "quantization_level": facts.weights,
    }


def _time(unix: float) -> str:
    return datetime.fromtimestamp(unix, UTC).isoformat().replace("+00:00", "Z")
