"""What is asked elsewhere in the long soak: ``python -m tests.survive.soak_upstream PORT TEXT``. Every tenth stream
breaks off in the middle."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import AsyncIterator

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route


def app(text: str) -> Starlette:
    numbers = itertools.count(1)

    async def answer(request: Request) -> StreamingResponse:
        await request.body()
        number = next(numbers)

        async def events() -> AsyncIterator[str]:
            for word in text.split(" "):
                if number % 10 == 0 and word == text.split(" ")[-1]:
                    raise RuntimeError("it breaks off")
                yield _event({"content": f"{word} "})
            yield _event({}, "stop")
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    return Starlette(routes=[Route("/v1/chat/completions", answer, methods=["POST"])])


def _event(delta: dict[str, str], finish: str | None = None) -> str:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return f"data: {json.dumps({'object': 'chat.completion.chunk', 'choices': [choice]})}\n\n"


if __name__ == "__main__":
    uvicorn.run(app(sys.argv[2]), host="127.0.0.1", port=int(sys.argv[1]), log_level="critical")
