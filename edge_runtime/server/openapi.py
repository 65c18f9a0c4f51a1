"""GET /openapi.json: what can be asked and answered, written from the very structs that requests are read into."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from edge_runtime.server.context import json_response
from edge_runtime.server.models import StopRequest
from edge_runtime.server.wire.chat import ChatRequest
from edge_runtime.server.wire.completions import CompletionRequest
from edge_runtime.server.wire.embeddings import EmbeddingsRequest
from edge_runtime.server.wire.ollama import OllamaChat, OllamaEmbed, OllamaGenerate, OllamaShow
from edge_runtime.server.wire.responses import ResponsesRequest
from edge_runtime.server.wire.tokens import DetokenizeRequest, TokenizeRequest
from edge_runtime.version import version

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_THEIR_ERROR = {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}
_OBJECT = {"type": "object"}
_REFUSALS: Mapping[str, str] = {
    "401": "There is no API key, or it is wrong",
    "403": "A web page of another origin asks, and there is no API key",
    "408": "The body took too long to come",
    "413": "The body is too large",
    "429": "Too many requests; Retry-After says when to try again",
}
_FAILURES: Mapping[str, str] = {
    "400": "The request is refused; param names the field",
    "404": "There is no such model",
    "502": "A tier elsewhere failed",
    "503": "There is no room now; Retry-After says when to try again",
}


class _Endpoint(msgspec.Struct, frozen=True):
    """One that takes a body."""

    path: str
    summary: str
    body: Any
    stream: str | None = None
    """Media type of what streams."""
    theirs: bool = False
    """Errors are as Ollama's clients read them."""


_POSTS = (
    _Endpoint("/v1/chat/completions", "Answer a conversation", ChatRequest, "text/event-stream"),
    _Endpoint("/v1/responses", "Answer a conversation, and keep it", ResponsesRequest, "text/event-stream"),
    _Endpoint("/v1/completions", "Go on from text", CompletionRequest, "text/event-stream"),
    _Endpoint("/v1/embeddings", "Embed texts", EmbeddingsRequest),
    _Endpoint("/v1/models/stop", "Close a model that was opened on demand", StopRequest),
    _Endpoint("/tokenize", "Token ids of text or messages", TokenizeRequest),
    _Endpoint("/detokenize", "Text of token ids", DetokenizeRequest),
    _Endpoint("/api/chat", "Answer a conversation (Ollama)", OllamaChat, "application/x-ndjson", True),
    _Endpoint("/api/generate", "Answer a prompt (Ollama)", OllamaGenerate, "application/x-ndjson", True),
    _Endpoint("/api/embed", "Embed texts (Ollama)", OllamaEmbed, None, True),
    _Endpoint("/api/show", "What a model is (Ollama)", OllamaShow, None, True),
)
_GETS = {
    "/v1/models": "List the models",
    "/v1/models/{model}": "What a model is, and what it runs on",
    "/v1/responses/{id}": "A response that is kept",
    "/v1/chat/completions/{id}": "A request that is answered later",
    "/api/tags": "List the models (Ollama)",
    "/api/ps": "List the models that are loaded (Ollama)",
    "/api/version": "Version of Ollama's API",
    "/health": "Whether every model can answer",
    "/health/ready": "Whether every model can answer",
    "/health/live": "Whether the process answers",
    "/metrics": "For Prometheus",
    "/slo": "Which requests met the latency that their class wants, and why others did not",
    "/traces": "Where the time of the newest requests went",
}
_QUERIES: Mapping[str, Mapping[str, tuple[dict[str, Any], str]]] = {
    "/traces": {
        "limit": ({"type": "integer", "minimum": 0, "default": 100}, "How many requests"),
        "format": ({"enum": ["json", "chrome"]}, "Sums, or all spans in Chrome's trace event format"),
    }
}
"""Path → parameter → schema, and what it is."""
_DELETES = {
    "/v1/responses/{id}": "Forget a response",
    "/v1/chat/completions/{id}": "Take back a request that is answered later",
}


async def openapi(request: Request) -> Response:
    return json_response(description())


@cache
def description() -> dict[str, Any]:
    """OpenAPI 3.1."""
    kinds = [each.body for each in _POSTS]
    schemas, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    paths: dict[str, Any] = {}
    for endpoint, schema in zip(_POSTS, schemas, strict=True):
        paths[endpoint.path] = {"post": _post(endpoint, schema)}
    for method, listed in (("get", _GETS), ("delete", _DELETES)):
        for path, summary in listed.items():
            paths.setdefault(path, {})[method] = _plain(path, summary)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Edge-GLM", "version": version()},
        "paths": paths,
        "components": {
            "schemas": {**components, "Error": _ERROR, "OllamaError": _THEIR_ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _post(endpoint: _Endpoint, schema: dict[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": _OBJECT}}
    if endpoint.stream is not None:
        content[endpoint.stream] = {"schema": {"type": "string"}}
    responses: dict[str, Any] = {"200": {"description": "The answer", "content": content}}
    if endpoint.path == "/v1/chat/completions":
        responses["202"] = {"description": "It is answered later", "content": {"application/json": {"schema": _OBJECT}}}
    responses |= _errors(_FAILURES, "OllamaError" if endpoint.theirs else "Error") | _errors(_REFUSALS, "Error")
    return {
        "summary": endpoint.summary,
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": responses,
    }


def _plain(path: str, summary: str) -> dict[str, Any]:
    text = {"text/plain": {"schema": {"type": "string"}}}
    content = text if path == "/metrics" else {"application/json": {"schema": _OBJECT}}
    failures = {"404": "There is none", "409": "It is being answered", "503": "Not all models can answer"}
    names = [name for name in ("model", "id") if f"{{{name}}}" in path]
    parameters = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]
    failures |= {"400": "The request is refused"} if path in _QUERIES else {}
    parameters += [
        {"name": name, "in": "query", "required": False, "schema": schema, "description": words}
        for name, (schema, words) in _QUERIES.get(path, {}).items()
    ]
    responses = {"200": {"description": "The answer", "content": content}, **_errors(failures, "Error")}
    return {
        "summary": summary,
        "responses": responses | _errors({"401": _REFUSALS["401"]}, "Error"),
        **({"parameters": parameters} if parameters else {}),
    }


def _errors(told: Mapping[str, str], kind: str) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{kind}"}
    return {
        status: {"description": words, "content": {"application/json": {"schema": schema}}}
        for status, words in told.items()
    }
