"""A request as an OpenAI-compatible endpoint takes it: what was asked, and nothing else that is known of it.

What an endpoint would misunderstand is never sent: :func:`unsupported` says why it cannot take the request.
"""

from __future__ import annotations

from typing import Any

from edge_runtime.policy.rules import RemoteTierSpec
from edge_runtime.prompts import Messages, Text, TierRequest, TokenIds
from edge_runtime.sampling import SamplingParams

_STANDARD = ("temperature", "top_p", "seed", "stop")
_EXTRA = ("top_k", "min_p", "repetition_penalty")


def unsupported(spec: RemoteTierSpec, request: TierRequest) -> str | None:
    """Why this endpoint cannot take the request; None: it can."""
    params = request.params
    if isinstance(request.prompt, TokenIds):
        return "token ids mean something to the local model only"
    if isinstance(request.prompt, Text) and not spec.completions:
        return "it has no /completions for plain text"
    if params.logit_bias or params.stop_token_ids or params.ignore_eos:
        return "logit_bias, stop_token_ids and ignore_eos speak of the local model's tokens"
    if params.logprobs is not None:
        return "logprobs are given for the local model's tokens only"
    if params.grammar is not None and not params.grammar.json:
        return f"it cannot be held to a grammar of kind {params.grammar.kind}"
    if params.grammar is not None and isinstance(request.prompt, Text):
        return "plain text there has no response_format"
    extra = [name for name in _EXTRA if getattr(params, name) is not None]
    if extra and not spec.extra_sampling:
        return f"it does not know {', '.join(extra)}"
    return None


def body_of(spec: RemoteTierSpec, request: TierRequest) -> tuple[str, dict[str, Any]]:
    """Path after the base URL, and the JSON."""
    prompt, params = request.prompt, request.params
    body: dict[str, Any] = {"model": spec.model}
    if isinstance(prompt, Messages):
        path, body["messages"] = "/chat/completions", [dict(message) for message in prompt.messages]
        limit = spec.max_tokens_field
    else:
        assert isinstance(prompt, Text)
        path, body["prompt"], limit = "/completions", prompt.text, "max_tokens"
    body[limit] = answer_limit(spec, params)
    for name in (*_STANDARD, *_EXTRA):
        value = getattr(params, name)
        if value not in (None, ()):
            body[name] = list(value) if name == "stop" else value
    body |= {name: value for name in ("presence_penalty", "frequency_penalty") if (value := getattr(params, name))}
    if params.n > 1:
        body["n"] = params.n
    if params.grammar is not None:
        body["response_format"] = params.grammar.response_format
    return path, {**body, **request.about.extras, "stream": True, "stream_options": {"include_usage": True}}


def answer_limit(spec: RemoteTierSpec, params: SamplingParams) -> int:
    """Tokens of the answer."""
    return spec.max_output if params.max_tokens is None else params.max_tokens
