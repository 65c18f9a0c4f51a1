"""POST /v1/embeddings."""

from __future__ import annotations

import base64
import threading
from collections.abc import Sequence
from typing import Any

import anyio.to_thread
import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.types import ASGIApp

from edge_runtime.embedder import Embeddings
from edge_runtime.errors import InvalidRequest
from edge_runtime.server.context import GONE, ServerContext, json_response, read_body
from edge_runtime.server.running import while_connected
from edge_runtime.server.served import ServedEmbedder
from edge_runtime.server.wire.embeddings import EmbeddingsRequest
from edge_runtime.server.wire.parse import parse
from edge_runtime.tracing.trace import span

Texts = Sequence[str] | Sequence[Sequence[int]]


async def embeddings(request: Request) -> ASGIApp:
    body = parse(await read_body(request), EmbeddingsRequest)
    async with await ServerContext.of(request).shelf.encoder(body.model) as lease:
        model = lease.model
        check_dimensions(model, body.dimensions)
        found = await embedded(request, model, body.texts())
    if found is None:
        return GONE
    data = [
        {"object": "embedding", "index": index, "embedding": _written(vector, body.encoding_format)}
        for index, vector in enumerate(found.vectors)
    ]
    usage = {"prompt_tokens": found.tokens, "total_tokens": found.tokens}
    return json_response({"object": "list", "data": data, "model": model.model_id, "usage": usage})


def check_dimensions(model: ServedEmbedder, wanted: int | None) -> None:
    """InvalidRequest for a part of the vector: without training for it, a part is no shorter embedding."""
    if wanted is not None and wanted != model.hidden_size:
        raise InvalidRequest(f"dimensions is {wanted}; this model's embeddings have {model.hidden_size}", "dimensions")


async def embedded(
    request: Request, model: ServedEmbedder, texts: Texts, *, truncate: bool = False
) -> Embeddings | None:
    """Off the event loop, batch by batch as long as the client is there; None: it has left."""
    gone = threading.Event()
    found: list[Embeddings] = []

    def run() -> Embeddings:
        return model.embed(texts, truncate=truncate, wanted=lambda: not gone.is_set())

    async def work() -> None:
        try:
            with span("embed"):
                async with ServerContext.of(request).embedding:
                    found.append(await anyio.to_thread.run_sync(run, abandon_on_cancel=True))
        finally:
            gone.set()

    return found[0] if await while_connected(request.receive, work) else None


def _written(vector: NDArray[np.float32], form: str) -> Any:
    if form == "float":
        return vector.tolist()
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
