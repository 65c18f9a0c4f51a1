"""Our server inside a FastAPI application, beside an endpoint of one's own.

``EDGE_GLM_MODEL=smollm2:135m uvicorn --app-dir samples fastapi_app:app``; the whole API is then below /llm, as
http://127.0.0.1:8000/llm/v1/chat/completions.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio.to_thread
from fastapi import FastAPI
from pydantic import BaseModel

from edge_runtime import EdgeLLM, SamplingParams
from edge_runtime.server.app import create_app


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    llm = await anyio.to_thread.run_sync(EdgeLLM, os.environ.get("EDGE_GLM_MODEL", "smollm2:135m"))
    app.state.llm = llm
    app.mount("/llm", create_app(llm))
    yield
    await anyio.to_thread.run_sync(llm.close)


app = FastAPI(lifespan=lifespan)


class Note(BaseModel):
    text: str


@app.post("/title")
async def title(note: Note) -> dict[str, str]:
    question = f"Write a title of at most five words for this text:\n{note.text}"
    with app.state.llm.start_chat([{"role": "user", "content": question}], SamplingParams(max_tokens=16)) as generation:
        words = [chunk.checked().text async for chunk in generation]
    return {"title": "".join(words).strip()}
