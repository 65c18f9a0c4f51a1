"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edge_runtime.errors import InvalidRequest
from edge_runtime.prompts import About
from edge_runtime.sampling import SamplingParams
from edge_runtime.server.wire.parse import refuse_unsupported
from edge_runtime.server.wire.sampling import SamplingFields, check_sampling, sampling_params

MAX_PROMPTS = 128


class CompletionRequest(SamplingFields, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[str | int | list[int]]
    logprobs: int | None = None
    echo: Any = None
    suffix: Any = None
    best_of: int | None = None

    def check(self) -> None:
        refuse_unsupported(self)
        check_sampling(self)
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise InvalidRequest("best_of other than n is not supported", "best_of")

    def about(self, headers: Mapping[str, str]) -> About:
        """What routing may go by."""
        return self.about_request(headers, {})

    def prompts(self) -> list[str | list[int]]:
        """One text or list of token ids per prompt. InvalidRequest if the list is empty or mixed."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if not prompt:
            raise InvalidRequest("prompt must not be an empty list", "prompt")
        ids = [item for item in prompt if isinstance(item, int)]
        if len(ids) == len(prompt):
            return [_token_ids(ids, "prompt")]
        if len(prompt) > MAX_PROMPTS:
            raise InvalidRequest(f"prompt holds {len(prompt)} prompts; the limit is {MAX_PROMPTS}", "prompt")
        texts: list[str | list[int]] = [item for item in prompt if isinstance(item, str)]
        if len(texts) == len(prompt):
            return texts
        lists: list[str | list[int]] = [
            _token_ids(item, f"prompt[{index}]") for index, item in enumerate(prompt) if isinstance(item, list)
        ]
        if len(lists) == len(prompt):
            return lists
        raise InvalidRequest("prompt must hold only strings, only token ids or only lists of token ids", "prompt")

    def params(self) -> SamplingParams:
        # 16 is OpenAI's default for this endpoint (chat has none)
        return sampling_params(self, 16 if self.max_tokens is None else self.max_tokens, self.logprobs)


def _token_ids(ids: list[int], where: str) -> list[int]:
    if not ids:
        raise InvalidRequest(f"{where} holds no token ids", where)
    for token in ids:
        if not 0 <= token < 2**31:
            raise InvalidRequest(f"{where}: {token} is not a token id", where)
    return ids
