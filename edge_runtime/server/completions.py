"""POST /v1/completions: plain text or token ids in, text out. Choices are numbered prompt by prompt."""

from __future__ import annotations

from functools import partial
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.types import ASGIApp

from edge_runtime.request import Chunk
from edge_runtime.sampling import SamplingParams
from edge_runtime.server.context import GONE, ServerContext, head, json_response, read_body, usage_body
from edge_runtime.server.logprobs import TextLogprobs, shown
from edge_runtime.server.running import Running
from edge_runtime.server.served import ServedModel
from edge_runtime.server.shelf import Lease
from edge_runtime.server.sse import EventStream, Write, event
from edge_runtime.server.wire.completions import CompletionRequest
from edge_runtime.server.wire.parse import parse


async def completions(request: Request) -> ASGIApp:
    body = parse(await read_body(request), CompletionRequest)
    context = ServerContext.of(request)
    async with await context.shelf.text(body.model) as lease:
        return await _answered(request, context, body, lease)


async def _answered(
    request: Request, context: ServerContext, body: CompletionRequest, lease: Lease[ServedModel]
) -> ASGIApp:
    model = lease.model
    params = context.bounded(body.params())
    prompts = body.prompts()
    about = body.about(request.headers)
    starts = [partial(model.start_completion, prompt, params, about) for prompt in prompts]
    running = Running(starts, context.meter.watch(model.model_id))
    choices = len(prompts) * params.n
    if body.stream:
        await running.__aenter__()
        running.release_with(lease.keep())
        events = _Events(model, params, choices, body.include_usage)
        return EventStream(running, partial(_stream, events=events, include_usage=body.include_usage))
    answer = _Answer(model, params, choices)
    if not await running.finish(request.receive, answer.add):
        return GONE
    return json_response(answer.body(running), running.route.headers())


class _Answer:
    """Gathers the chunks of a request that does not stream."""

    def __init__(self, model: ServedModel, params: SamplingParams, choices: int) -> None:
        self._model = model
        self._params = params
        self._texts: list[list[str]] = [[] for _ in range(choices)]
        self._logprobs: list[list[Any]] = [[] for _ in range(choices)]
        self._finish: list[str | None] = [None] * choices

    async def add(self, number: int, chunk: Chunk) -> None:
        index = number * self._params.n + chunk.index
        self._texts[index].append(chunk.text)
        self._logprobs[index].extend(shown(chunk, self._model, self._params))
        if chunk.finish_reason is not None:
            self._finish[index] = chunk.finish_reason

    def body(self, running: Running) -> dict[str, Any]:
        logprobs_on = self._params.logprobs is not None
        choices = [
            {
                "index": index,
                "text": "".join(texts),
                "logprobs": TextLogprobs(self._model).lists(self._logprobs[index]) if logprobs_on else None,
                "finish_reason": self._finish[index],
            }
            for index, texts in enumerate(self._texts)
        ]
        return {
            **head("cmpl", "text_completion", self._model.model_id),
            "choices": choices,
            "usage": usage_body(running.usage()),
        }


async def _stream(running: Running, write: Write, *, events: _Events, include_usage: bool) -> None:
    async def emit(number: int, chunk: Chunk) -> None:
        data = events.of(number, chunk)
        if data:
            await write(data)

    await running.pump(emit)
    if include_usage:
        await write(events.usage(running))


class _Events:
    """Writes the events of one stream; what is the same in all of them is serialised once."""

    def __init__(self, model: ServedModel, params: SamplingParams, choices: int, include_usage: bool) -> None:
        self._model = model
        self._params = params
        self._head = head("cmpl", "text_completion", model.model_id)
        self._last = {"usage": None} if include_usage else {}  # OpenAI: null in all but the last event
        self._plain = [self._split_around_text(index) for index in range(choices)]
        self._logprobs = [TextLogprobs(model) for _ in range(choices)]

    def _event(self, index: int, text: Any, logprobs: Any = None, finish: str | None = None) -> bytes:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
        return event({**self._head, "choices": [choice], **self._last})

    def _split_around_text(self, index: int) -> tuple[bytes, bytes]:
        before, after = self._event(index, 0).split(b'"text":0')
        return before + b'"text":', after

    def of(self, number: int, chunk: Chunk) -> bytes:
        """The event of a chunk of generation ``number``; nothing if it says nothing."""
        index = number * self._params.n + chunk.index
        logprobs = shown(chunk, self._model, self._params)
        if logprobs or chunk.finish_reason is not None:
            lists = self._logprobs[index].lists(logprobs) if logprobs else None
            return self._event(index, chunk.text, lists, chunk.finish_reason)
        if not chunk.text:
            return b""
        before, after = self._plain[index]
        return before + msgspec.json.encode(chunk.text) + after

    def usage(self, running: Running) -> bytes:
        return event({**self._head, "choices": [], "usage": usage_body(running.usage())})
