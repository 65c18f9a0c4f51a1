"""POST /v1/chat/completions."""

from __future__ import annotations

from functools import partial
from typing import Any

import anyio.to_thread
import msgspec
from starlette.requests import Request
from starlette.types import ASGIApp

from edge_runtime.errors import PromptTooLong
from edge_runtime.generation import Generation
from edge_runtime.prompts import About, Messages, TierRequest
from edge_runtime.request import Chunk
from edge_runtime.route import Route
from edge_runtime.sampling import SamplingParams
from edge_runtime.server.chat_deferred import defer, deferred_response
from edge_runtime.server.context import GONE, ServerContext, head, json_response, message_body, read_body, usage_body
from edge_runtime.server.logprobs import chat_logprobs, shown
from edge_runtime.server.running import Running
from edge_runtime.server.served import ServedModel
from edge_runtime.server.shelf import Lease
from edge_runtime.server.sse import EventStream, Write, event
from edge_runtime.server.wire.chat import ChatRequest
from edge_runtime.server.wire.parse import parse
from edge_runtime.tools.pieces import add_call


async def chat_completions(request: Request) -> ASGIApp:
    body = parse(await read_body(request), ChatRequest)
    context = ServerContext.of(request)
    async with await context.shelf.text(body.model) as lease:
        return await _answered(request, context, body, lease)


async def _answered(request: Request, context: ServerContext, body: ChatRequest, lease: Lease[ServedModel]) -> ASGIApp:
    model = lease.model
    params = context.bounded(body.params(), body.limit_field)
    messages = [message.plain() for message in body.messages]
    about = body.about(request.headers, model.tiers is not None)
    if model.tiers is not None:
        asked = TierRequest(Messages(messages), params, about)
        ticket = await anyio.to_thread.run_sync(defer, model.tiers, asked, body.stream)
        if ticket is not None:
            return deferred_response(ticket, model.model_id, 202)
    start = partial(_start, body, model, messages, params, about)
    running = Running([start], context.meter.watch(model.model_id))
    if body.stream:
        await running.__aenter__()
        running.release_with(lease.keep())
        return EventStream(running, partial(_stream, model=model, params=params, include_usage=body.include_usage))
    answer = _Answer(model, params)
    if not await running.finish(request.receive, answer.add):
        return GONE
    return json_response(answer.body(running), running.route.headers())


def _start(
    body: ChatRequest, model: ServedModel, messages: list[dict[str, Any]], params: SamplingParams, about: About
) -> Generation:
    try:
        return model.start_chat(messages, params, about)
    except PromptTooLong as error:
        if error.param == "max_tokens":
            raise PromptTooLong(str(error), body.limit_field) from error  # the field by the client's name
        raise


class _Answer:
    """Gathers the chunks of a request that does not stream."""

    def __init__(self, model: ServedModel, params: SamplingParams) -> None:
        self._model = model
        self._params = params
        self._texts: list[list[str]] = [[] for _ in range(params.n)]
        self._logprobs: list[list[Any]] = [[] for _ in range(params.n)]
        self._finish: list[str | None] = [None] * params.n
        self._calls: list[list[dict[str, Any]]] = [[] for _ in range(params.n)]

    async def add(self, number: int, chunk: Chunk) -> None:
        self._texts[chunk.index].append(chunk.text)
        for call in (chunk.extra or {}).get("tool_calls", ()):
            add_call(self._calls[chunk.index], call)
        if chunk.logprobs:
            entries = chat_logprobs(shown(chunk, self._model, self._params), self._model)["content"]
            self._logprobs[chunk.index].extend(entries)
        if chunk.finish_reason is not None:
            self._finish[chunk.index] = chunk.finish_reason

    def body(self, running: Running) -> dict[str, Any]:
        logprobs_on = self._params.logprobs is not None
        choices = [
            {
                "index": index,
                "message": message_body("".join(self._texts[index]), self._calls[index]),
                "logprobs": {"content": self._logprobs[index], "refusal": None} if logprobs_on else None,
                "finish_reason": self._finish[index],
            }
            for index in range(self._params.n)
        ]
        return {
            **head("chatcmpl", "chat.completion", self._model.model_id),
            "choices": choices,
            "usage": usage_body(running.usage()),
        }


async def _stream(
    running: Running, write: Write, *, model: ServedModel, params: SamplingParams, include_usage: bool
) -> None:
    events = _Events(model, params, include_usage)
    await write(b"".join(events.opening(index) for index in range(params.n)))

    async def emit(number: int, chunk: Chunk) -> None:
        data = events.of(chunk, running.route)
        if data:
            await write(data)

    await running.pump(emit)
    if include_usage:
        await write(events.usage(running))


class _Events:
    """Writes the events of one stream; what is the same in all of them is serialised once."""

    def __init__(self, model: ServedModel, params: SamplingParams, include_usage: bool) -> None:
        self._model = model
        self._params = params
        self._head = head("chatcmpl", "chat.completion.chunk", model.model_id)
        self._last = {"usage": None} if include_usage else {}  # OpenAI: null in all but the last event
        self._plain = [self._split_around_text(index) for index in range(params.n)]

    def _event(
        self, index: int, delta: dict[str, Any], logprobs: Any = None, finish: str | None = None, **more: Any
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return event({**self._head, "choices": [choice], **self._last, **more})

    def _split_around_text(self, index: int) -> tuple[bytes, bytes]:
        before, after = self._event(index, {"content": 0}).split(b'"content":0')
        return before + b'"content":', after

    def opening(self, index: int) -> bytes:
        return self._event(index, {"role": "assistant", "content": "", "refusal": None})

    def of(self, chunk: Chunk, route: Route) -> bytes:
        """A chunk's events: one for its text, one for its end."""
        data = b""
        if chunk.logprobs and (logprobs := shown(chunk, self._model, self._params)):
            data = self._event(chunk.index, {"content": chunk.text}, chat_logprobs(logprobs, self._model))
        elif chunk.extra:
            data = self._event(chunk.index, {**({"content": chunk.text} if chunk.text else {}), **chunk.extra})
        elif chunk.text:
            before, after = self._plain[chunk.index]
            data = before + msgspec.json.encode(chunk.text) + after
        if chunk.finish_reason is not None:
            # the headers, which have long been sent, name the tier that it began with
            told = {} if route.continued is None else {"edge_glm": {"tier": chunk.tier, "continued": route.continued}}
            data += self._event(chunk.index, {}, None, chunk.finish_reason, **told)
        return data

    def usage(self, running: Running) -> bytes:
        return event({**self._head, "choices": [], "usage": usage_body(running.usage())})
