"""POST /v1/embeddings."""

from __future__ import annotations

from typing import Literal

import msgspec

from edge_runtime.errors import InvalidRequest

MAX_INPUTS = 2048
"""As OpenAI takes."""


class EmbeddingsRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    model: str
    input: str | list[str | int | list[int]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: str | None = None

    def check(self) -> None:
        """InvalidRequest for what the types do not say."""
        if isinstance(self.input, list) and not self.input:
            raise InvalidRequest("input must not be an empty list", "input")
        if len(self.texts()) > MAX_INPUTS:
            raise InvalidRequest(f"input holds {len(self.input)} texts; the limit is {MAX_INPUTS}", "input")

    def texts(self) -> list[str] | list[list[int]]:
        """One text, or list of token ids, for each embedding. InvalidRequest if they are mixed."""
        given = self.input
        if isinstance(given, str):
            return [given]
        texts = [item for item in given if isinstance(item, str)]
        if len(texts) == len(given):
            return texts
        ids = [item for item in given if isinstance(item, int)]
        if len(ids) == len(given):
            return [ids]
        lists = [item for item in given if isinstance(item, list)]
        if len(lists) == len(given):
            return lists
        raise InvalidRequest("input must hold only strings, only token ids or only lists of token ids", "input")
