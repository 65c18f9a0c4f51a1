"""What chats, completions and responses have in common: the model, how it draws tokens, how the answer is sent.

Accepted and without effect, because they ask nothing of this server: ``user``, ``safety_identifier`` and
``prompt_cache_key`` (identifiers for OpenAI's own accounting and routing), ``metadata`` (labels of *stored*
completions). Routing may go by them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from edge_runtime.errors import InvalidRequest
from edge_runtime.grammar import Grammar
from edge_runtime.policy.check import FIELDS
from edge_runtime.prompts import About
from edge_runtime.sampling import SamplingParams

MAX_STOPS = 64
"""OpenAI takes 4."""
_SECRET = ("authorization", "cookie", "proxy-authorization")


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    include_usage: bool = False
    include_obfuscation: bool = False


class SamplingFields(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    logit_bias: dict[str, float] | None = None
    n: int | None = None
    max_tokens: int | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = None
    store: Any = None
    service_tier: Any = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def about_request(self, headers: Mapping[str, str], extras: Mapping[str, Any]) -> About:
        fields = {name: value for name in FIELDS if isinstance(value := getattr(self, name), str)}
        return about_of(headers, self.metadata, fields, extras)


def about_of(
    headers: Mapping[str, str],
    metadata: Mapping[str, str] | None,
    fields: Mapping[str, str],
    extras: Mapping[str, Any],
) -> About:
    """What routing may go by; no secret is in it."""
    told = {name.lower(): value for name, value in headers.items() if name.lower() not in _SECRET}
    return About(told, metadata or {}, fields, extras)


def sampling_params(
    request: SamplingFields,
    max_tokens: int | None,
    logprobs: int | None,
    renamed: Mapping[str, str] | None = None,
    grammar: Grammar | None = None,
) -> SamplingParams:
    """``renamed``: what a field of SamplingParams is called in this request."""
    stop = request.stop
    stops = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    if len(stops) > MAX_STOPS:
        raise InvalidRequest(f"stop holds {len(stops)} strings; the limit is {MAX_STOPS}", "stop")
    try:
        return SamplingParams(
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            min_p=request.min_p,
            repetition_penalty=request.repetition_penalty,
            presence_penalty=request.presence_penalty or 0.0,
            frequency_penalty=request.frequency_penalty or 0.0,
            seed=request.seed,
            max_tokens=max_tokens,
            stop=stops,
            stop_token_ids=tuple(request.stop_token_ids or ()),
            logit_bias={_token_key(key): value for key, value in (request.logit_bias or {}).items()},
            ignore_eos=bool(request.ignore_eos),
            n=1 if request.n is None else request.n,
            logprobs=logprobs,
            grammar=grammar,
        )
    except InvalidRequest as error:
        name = (renamed or {}).get(error.param or "")
        if name is None:
            raise
        raise InvalidRequest(str(error).replace(error.param or "", name, 1), name) from error


def _token_key(key: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) < 11):
        raise InvalidRequest(f"logit_bias: {key[:40]!r} is not a token id", "logit_bias")
    return int(key)


def check_sampling(request: SamplingFields) -> None:
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("stream_options needs stream to be true", "stream_options")
    if request.temperature is not None and not 0 <= request.temperature <= 2:
        raise InvalidRequest(f"temperature must be from 0 to 2, not {request.temperature:g}", "temperature")
