"""Answer a batch: so many requests at once as the engine batches, written in the order of their lines."""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
from starlette.types import ASGIApp, Message

from edge_runtime.batch.files import Answers, Line, read_requests
from edge_runtime.errors import EngineStopped

AHEAD = 4
"""Times as many requests may be under way or answered as run at once, before the slowest of them is written."""
Progress = Callable[[int], None]


async def answer_batch(
    app: ASGIApp, requests: Path, answers: Answers, names: Mapping[str, str], at_once: int, progress: Progress
) -> int:
    """Answer those of ``requests`` that ``answers`` lacks; returns how many failed. ``names``: of the models as the
    lines have them → as ``app`` has them. ``progress`` hears how many are written. EngineStopped where a model can
    answer no more: what is left then is for the next run."""
    room = asyncio.Semaphore(at_once)
    waiting: deque[asyncio.Task[dict[str, Any]]] = deque()
    failed = 0

    async def ask(line: Line) -> dict[str, Any]:
        async with room:
            return await _answer(app, line, names)

    async def write_first() -> None:
        nonlocal failed
        answer = await waiting.popleft()
        await asyncio.to_thread(answers.write, answer)
        failed += answer["response"]["status_code"] != 200
        progress(answers.done)

    try:
        for line in itertools.islice(read_requests(requests), answers.done, None):
            waiting.append(asyncio.create_task(ask(line)))
            while waiting and (len(waiting) >= AHEAD * at_once or waiting[0].done()):
                await write_first()
        while waiting:
            await write_first()
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
    return failed


async def _answer(app: ASGIApp, line: Line, names: Mapping[str, str]) -> dict[str, Any]:
    body = msgspec.json.encode({**line.body, "model": names[line.body["model"]]})
    while True:
        status, text, headers = await _call(app, line.url, body)
        if status != 503 or b"retry-after" not in headers:
            break
        await asyncio.sleep(float(headers[b"retry-after"]))  # there is no room just now
    answer = msgspec.json.decode(text)
    if status == 503 and answer["error"]["code"] == "engine_stopped":
        raise EngineStopped(answer["error"]["message"])
    request = f"req-{uuid.uuid4().hex}"
    return {
        "id": f"batch_{request}",
        "custom_id": line.custom_id,
        "response": {"status_code": status, "request_id": request, "body": answer},
        "error": None,
    }


async def _call(app: ASGIApp, path: str, body: bytes) -> tuple[int, bytes, dict[bytes, bytes]]:
    """A POST to the application, without a network between."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())],
        "client": None,
        "server": None,
    }
    sent = False
    never = asyncio.Event()
    status, headers, pieces = 500, {}, []

    async def receive() -> Message:
        nonlocal sent
        if sent:
            await never.wait()  # nobody leaves
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        nonlocal status, headers
        if message["type"] == "http.response.start":
            status, headers = message["status"], dict(message["headers"])
        elif message["type"] == "http.response.body":
            pieces.append(message.get("body", b""))

    await app(scope, receive, send)
    return status, b"".join(pieces), headers
