"""POST /tokenize and /detokenize: what a model makes of text, without running it."""

from __future__ import annotations

from typing import Any

import anyio.to_thread
from starlette.requests import Request
from starlette.responses import Response

from edge_runtime.prompts import Messages, Text
from edge_runtime.server.context import ServerContext, json_response, read_body
from edge_runtime.server.served import ServedModel
from edge_runtime.server.wire.parse import parse
from edge_runtime.server.wire.tokens import DetokenizeRequest, TokenizeRequest


async def tokenize(request: Request) -> Response:
    body = parse(await read_body(request), TokenizeRequest)
    shelf = ServerContext.of(request).shelf
    async with await shelf.text(shelf.only_text() if body.model is None else body.model) as lease:
        return json_response(await anyio.to_thread.run_sync(_tokenized, body, lease.model))  # a long text takes a while


def _tokenized(body: TokenizeRequest, model: ServedModel) -> dict[str, Any]:
    def encode() -> list[int]:
        if body.messages is not None:
            return model.tokenize(Messages([message.plain() for message in body.messages]))
        return model.tokenize(Text(body.prompt or ""), add_bos=body.add_special_tokens)

    ids = encode()
    answer: dict[str, Any] = {"count": len(ids), "max_model_len": model.max_context, "tokens": ids}
    return answer | ({"token_strs": _pieces(model, ids)} if body.return_token_strs else {})


async def detokenize(request: Request) -> Response:
    body = parse(await read_body(request), DetokenizeRequest)
    shelf = ServerContext.of(request).shelf
    async with await shelf.text(shelf.only_text() if body.model is None else body.model) as lease:
        return json_response({"prompt": await anyio.to_thread.run_sync(lease.model.detokenize, body.tokens)})


def _pieces(model: ServedModel, ids: list[int]) -> list[str]:
    return [model.token_bytes(token).decode(errors="replace") for token in ids]
