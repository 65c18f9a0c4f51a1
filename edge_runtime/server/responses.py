"""POST /v1/responses, and the responses that are kept."""

from __future__ import annotations

import time
import uuid
from functools import partial
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from edge_runtime.errors import InvalidRequest, PromptTooLong
from edge_runtime.generation import Generation
from edge_runtime.prompts import About
from edge_runtime.request import Chunk
from edge_runtime.sampling import SamplingParams
from edge_runtime.server.context import GONE, ServerContext, caller, json_response, read_body
from edge_runtime.server.logprobs import entries_of, shown
from edge_runtime.server.response_events import ResponseEvents, failed_event, text_part
from edge_runtime.server.running import Running
from edge_runtime.server.served import ServedModel
from edge_runtime.server.shelf import Lease
from edge_runtime.server.sse import EventStream, Write
from edge_runtime.server.wire.parse import parse
from edge_runtime.server.wire.responses import ResponsesRequest, check_calls
from edge_runtime.tools.pieces import add_call, whole

Messages = list[dict[str, Any]]


async def responses(request: Request) -> ASGIApp:
    body = parse(await read_body(request), ResponsesRequest)
    context = ServerContext.of(request)
    async with await context.shelf.text(body.model) as lease:
        return await _answered(request, context, body, lease)


async def _answered(
    request: Request, context: ServerContext, body: ResponsesRequest, lease: Lease[ServedModel]
) -> ASGIApp:
    model = lease.model
    who = caller(request)
    talk = [*_earlier(context, body, who), *body.messages()]
    check_calls(talk)
    told: Messages = [] if body.instructions is None else [{"role": "system", "content": body.instructions}]
    params = context.bounded(body.params(), "max_output_tokens")
    start = partial(_start, model, [*told, *talk], params, body.about(request.headers))
    running = Running([start], context.meter.watch(model.model_id))
    answer = ResponseAnswer(model, body, params)

    def keep() -> None:
        if body.kept:
            context.responses.add(who, answer.body(running), [*talk, answer.message()])

    if body.stream:
        await running.__aenter__()
        running.release_with(lease.keep())
        return EventStream(running, partial(_stream, answer=answer, keep=keep), end=b"", failed=failed_event)
    if not await running.finish(request.receive, answer.add):
        return GONE
    keep()
    return json_response(answer.body(running), running.route.headers())


async def get_response(request: Request) -> Response:
    return json_response(_kept(request).body)


async def delete_response(request: Request) -> Response:
    _kept(request)
    id = request.path_params["id"]
    ServerContext.of(request).responses.remove(id, caller(request))
    return json_response({"id": id, "object": "response", "deleted": True})


def _kept(request: Request) -> Any:
    id = request.path_params["id"]
    kept = ServerContext.of(request).responses.get(id, caller(request))
    if kept is None:
        raise HTTPException(404, f"there is no response {id[:100]!r}: it was not stored, or is gone")
    return kept


def _earlier(context: ServerContext, body: ResponsesRequest, who: str) -> Messages:
    if body.previous_response_id is None:
        return []
    kept = context.responses.get(body.previous_response_id, who)
    if kept is None:
        raise InvalidRequest(
            f"there is no response {body.previous_response_id[:100]!r}: it was not stored, or is gone; send the whole "
            "conversation as input",
            "previous_response_id",
        )
    return kept.conversation


def _start(model: ServedModel, messages: Messages, params: SamplingParams, about: About) -> Generation:
    try:
        return model.start_chat(messages, params, about)
    except PromptTooLong as error:
        field = "max_output_tokens" if error.param == "max_tokens" else "input"
        raise PromptTooLong(str(error).replace("max_tokens", field), field) from error  # by the client's name
    except InvalidRequest as error:
        if error.param == "response_format":
            raise InvalidRequest(str(error), "text.format") from error
        raise


class ResponseAnswer:
    """Gathers what a response is made of."""

    def __init__(self, model: ServedModel, asked: ResponsesRequest, params: SamplingParams) -> None:
        self.id = f"resp_{uuid.uuid4().hex}"
        self.message_id = f"msg_{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = model
        self._asked = asked
        self._params = params
        self._text: list[str] = []
        self._logprobs: Messages = []
        self._waiting: Messages = []
        """Logprobs of tokens whose text has not come, as it may be a call's."""
        self.fresh: Messages = []
        """Logprobs of what the last chunk has added to the text."""
        self._calls: Messages = []
        self._finish: str | None = None
        self.message_at: int | None = None
        """How many calls came before the text; None: there is none."""

    async def add(self, number: int, chunk: Chunk) -> None:
        if chunk.text and self.message_at is None:
            self.message_at = len(self._calls)
        self._text.append(chunk.text)
        self._waiting += entries_of(shown(chunk, self._model, self._params), self._model)
        self.fresh = []
        if chunk.text:
            self.fresh, self._waiting = self._waiting, []
            self._logprobs += self.fresh
        for piece in (chunk.extra or {}).get("tool_calls", ()):
            add_call(self._calls, piece)
        if chunk.finish_reason is not None:
            self._finish = chunk.finish_reason

    @property
    def text(self) -> str:
        return "".join(self._text)

    @property
    def status(self) -> str:
        return {None: "in_progress", "length": "incomplete", "content_filter": "incomplete"}.get(
            self._finish, "completed"
        )

    def message(self) -> dict[str, Any]:
        """As later prompts have it."""
        calls = whole(self._calls)
        return {"role": "assistant", "content": self.text or None, **({"tool_calls": calls} if calls else {})}

    def message_item(self, status: str | None = None) -> dict[str, Any]:
        return {
            "type": "message",
            "id": self.message_id,
            "status": status or self.status,
            "role": "assistant",
            "content": [] if status == "in_progress" else [text_part(self.text, self._logprobs)],
        }

    def call_items(self) -> Messages:
        return [call_item(call, self.status) for call in whole(self._calls)]

    def body(self, running: Running | None = None) -> dict[str, Any]:
        """Without ``running`` as it stands before anything has come."""
        asked, params = self._asked, self._params
        output = [] if running is None else self.call_items()
        if self.message_at is not None or (running is not None and not output):
            output.insert(self.message_at or 0, self.message_item())
        reasons = {"length": "max_output_tokens", "content_filter": "content_filter"}
        reason = reasons.get(self._finish or "")
        usage = None
        if running is not None:
            counted = running.usage()
            usage = {
                "input_tokens": counted.prompt_tokens,
                "input_tokens_details": {"cached_tokens": counted.cached_tokens},
                "output_tokens": counted.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": counted.total_tokens,
            }
        form = None if asked.text is None else asked.text.format
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "status": self.status,
            "error": None,
            "incomplete_details": None if reason is None else {"reason": reason},
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "model": self._model.model_id,
            "output": output,
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": asked.previous_response_id,
            "reasoning": {"effort": None, "summary": None},
            "store": asked.kept,
            "temperature": params.temperature,
            "text": {"format": {"type": "text"} if form is None else _form(form)},
            "tool_choice": "auto" if asked.tool_choice is None else asked.tool_choice,
            "tools": asked.tools or [],
            "top_logprobs": asked.top_logprobs or 0,
            "top_p": params.top_p,
            "truncation": "disabled",
            "usage": usage,
            "user": asked.user,
            "metadata": asked.metadata or {},
        }


def call_item(call: dict[str, Any], status: str) -> dict[str, Any]:
    """``call``: as a chat has it, its id with it."""
    function, id = call["function"], call.get("id") or ""
    return {
        "type": "function_call",
        "id": f"fc_{id.removeprefix('call_')}",
        "call_id": id,
        "name": function["name"],
        "arguments": function.get("arguments") or "",
        "status": status,
    }


def _form(form: Any) -> dict[str, Any]:
    fields = ("type", "name", "schema", "description", "strict", "syntax", "definition")
    return {name: value for name in fields if (value := getattr(form, name)) is not None}


async def _stream(running: Running, write: Write, *, answer: ResponseAnswer, keep: Any) -> None:
    events = ResponseEvents(answer)
    await write(events.opening())

    async def emit(number: int, chunk: Chunk) -> None:
        await answer.add(number, chunk)
        data = events.of(chunk)
        if data:
            await write(data)

    await running.pump(emit)
    keep()
    await write(events.closing(answer.body(running)))
