"""The requests' JSON, checked strictly: an unknown field, a wrong type or an unsupported wish is refused by name.

Accepted and without effect, because they ask nothing of this server: ``user``, ``safety_identifier`` and
``prompt_cache_key`` (identifiers for OpenAI's own accounting and routing), ``metadata`` (labels of *stored*
completions). Fields that would change the answer and are not supported are accepted only with the values that ask
for nothing (:data:`_UNSUPPORTED`), so that ``tools: []`` passes and ``tools: [...]`` does not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from edge_runtime.errors import InvalidRequest
from edge_runtime.grammar import Grammar
from edge_runtime.policy.check import FIELDS
from edge_runtime.prompts import About
from edge_runtime.sampling import SamplingParams
from edge_runtime.server.response_format import ResponseFormat

MAX_STOPS = 64
"""OpenAI takes 4."""
MAX_PROMPTS = 128
ROLES = ("system", "user", "assistant")
TOOL = "tool"
"""The role of a tool's answer, which models here do not know."""


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    include_usage: bool = False
    include_obfuscation: bool = False


class TextPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: str
    text: str | UnsetType = UNSET
    image_url: Any = UNSET
    input_audio: Any = UNSET
    file: Any = UNSET
    refusal: Any = UNSET


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    role: str
    content: str | list[TextPart] | None = None
    name: str | None = None
    # What clients send back from an earlier answer, all null there; see _UNSUPPORTED.
    refusal: Any = None
    annotations: Any = None
    audio: Any = None
    tool_calls: Any = None
    tool_call_id: Any = None
    function_call: Any = None

    @property
    def of_tools(self) -> str | None:
        """The field by which it calls tools or is a tool's answer."""
        if self.role == TOOL:
            return "role"
        return None if self.tool_calls in (None, []) else "tool_calls"

    def plain(self) -> dict[str, Any]:
        """As chat templates take it, and with what calls tools."""
        content = (
            self.content
            if isinstance(self.content, str)
            else [{"type": "text", "text": part.text} for part in self.content or ()]
        )
        more = {name: value for name in ("name", "tool_calls", "tool_call_id") if (value := getattr(self, name))}
        return {"role": self.role, "content": content if self.content is not None else None} | more


class _Sampling(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
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

    def _about(self, headers: Mapping[str, str], extras: Mapping[str, Any]) -> About:
        fields = {name: value for name in FIELDS if isinstance(value := getattr(self, name), str)}
        return About(
            {name.lower(): value for name, value in headers.items() if name.lower() not in _SECRET},
            self.metadata or {},
            fields,
            extras,
        )


class ChatRequest(_Sampling, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: Any = None
    functions: Any = None
    function_call: Any = None
    response_format: ResponseFormat | None = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    web_search_options: Any = None

    def check(self) -> None:
        """InvalidRequest for what the types do not say."""
        _check_common(self)
        if not self.messages:
            raise InvalidRequest("messages must hold at least one message", "messages")
        for index, message in enumerate(self.messages):
            _check_message(message, f"messages[{index}]")
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs to be true", "top_logprobs")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise InvalidRequest("max_tokens and max_completion_tokens mean the same: send one", "max_tokens")

    def about(self, headers: Mapping[str, str], takes_extras: bool) -> About:
        """What routing may go by. InvalidRequest for wishes that would have to be passed on and cannot be."""
        extras = {name: value for name in _PASSED_ON if not _asks_nothing(name, value := getattr(self, name))}
        if not takes_extras:
            for index, message in enumerate(self.messages):
                if message.of_tools is not None:
                    raise _of_tools(message, f"messages[{index}]")
            if extras:
                raise _unsupported(next(iter(extras)))
        return self._about(headers, extras)

    @property
    def grammar(self) -> Grammar | None:
        return None if self.response_format is None else self.response_format.grammar()

    def params(self) -> SamplingParams:
        alternatives = None
        if self.logprobs:
            alternatives = self.top_logprobs or 0
        limit = self.max_completion_tokens if self.max_tokens is None else self.max_tokens
        renamed = {"logprobs": "top_logprobs"}
        if self.max_tokens is None:
            renamed["max_tokens"] = "max_completion_tokens"
        return _params(self, limit, alternatives, renamed, self.grammar)


class CompletionRequest(_Sampling, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[str | int | list[int]]
    logprobs: int | None = None
    echo: Any = None
    suffix: Any = None
    best_of: int | None = None

    def check(self) -> None:
        _check_common(self)
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise InvalidRequest("best_of other than n is not supported", "best_of")

    def about(self, headers: Mapping[str, str]) -> About:
        """What routing may go by."""
        return self._about(headers, {})

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
        return _params(self, 16 if self.max_tokens is None else self.max_tokens, self.logprobs)


# --- reading ----------------------------------------------------------------------------------------------------------

Body = TypeVar("Body", ChatRequest, CompletionRequest)

_PATH = re.compile(r"^(?P<what>.*?)(?: - at `\$\.?(?P<path>[^`]*)`)?$", re.DOTALL)
_FIELD = re.compile(r"(?:unknown|required) field `(?P<name>[^`]*)`")


def parse(body: bytes, kind: type[Body]) -> Body:
    """The request in ``body``, checked. InvalidRequest with the field's path as ``param``."""
    try:
        request = msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from error
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not UTF-8: {error.reason} at byte {error.start}") from error
    except msgspec.DecodeError as error:
        raise InvalidRequest(
            f"the body is not valid JSON: {error}" if body else "the body is empty: send JSON"
        ) from error
    except RecursionError as error:
        raise InvalidRequest("the body's JSON is nested too deep") from error
    request.check()
    return request


def _invalid(text: str) -> InvalidRequest:
    found = _PATH.match(text)
    assert found is not None  # everything matches
    what, path = found["what"], found["path"] or ""
    field = _FIELD.search(what)
    if field is not None:
        path = f"{path}.{field['name']}" if path else field["name"]
        if "unknown" in what:
            return InvalidRequest(f"{path} is not a field this server knows", path)
        return InvalidRequest(f"{path} is missing", path)
    what = what.replace("`", "")
    return InvalidRequest(
        f"{path}: {what[0].lower()}{what[1:]}" if path else f"the body: {what[0].lower()}{what[1:]}", path or None
    )


# --- checks -----------------------------------------------------------------------------------------------------------

_UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    "store": (None, False),
    "service_tier": (None, "auto", "default", "flex"),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "parallel_tool_calls": (None, True, False),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "verbosity": (None,),
    "web_search_options": (None,),
    "echo": (None, False),
    "suffix": (None, ""),
    # of messages
    "refusal": (None,),
    "annotations": (None, []),
    "tool_calls": (None, []),
    "tool_call_id": (None,),
}
"""Field → the values that ask for nothing."""


_PASSED_ON = ("tools", "tool_choice", "parallel_tool_calls", "functions", "function_call")
"""Of them, those that a server elsewhere may know."""
_SECRET = ("authorization", "cookie", "proxy-authorization")


def _refuse_unsupported(struct: msgspec.Struct, prefix: str = "") -> None:
    for name in struct.__struct_fields__:
        passed_on = name in _PASSED_ON and isinstance(struct, ChatRequest)
        if not passed_on and not _asks_nothing(name, getattr(struct, name)):
            raise _unsupported(f"{prefix}{name}")


def _asks_nothing(name: str, value: Any) -> bool:
    """The field is supported, or its value asks for nothing."""
    harmless = _UNSUPPORTED.get(name)
    # 1 == True and 0 == False in Python, but not in JSON
    return harmless is None or any(type(value) is type(allowed) and value == allowed for allowed in harmless)


def _unsupported(name: str) -> InvalidRequest:
    return InvalidRequest(f"{name} is not supported by this server: leave it out", name)


def _check_common(request: _Sampling) -> None:
    _refuse_unsupported(request)
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("stream_options needs stream to be true", "stream_options")
    if request.temperature is not None and not 0 <= request.temperature <= 2:
        raise InvalidRequest(f"temperature must be from 0 to 2, not {request.temperature:g}", "temperature")


def _check_message(message: Message, where: str) -> None:
    if message.role not in (*ROLES, TOOL):
        raise _wrong_role(message, where)
    if message.role == TOOL and not isinstance(message.tool_call_id, str):
        raise InvalidRequest(f"{where}.tool_call_id is missing", f"{where}.tool_call_id")
    for name in ("refusal", "annotations", "audio", "function_call", *(() if message.of_tools else ("tool_call_id",))):
        if not _asks_nothing(name, getattr(message, name)):
            raise _unsupported(f"{where}.{name}")
    if message.content is None:
        if message.of_tools == "tool_calls":
            return
        raise InvalidRequest(f"{where}.content is missing", f"{where}.content")
    if isinstance(message.content, str):
        return
    for index, part in enumerate(message.content):
        place = f"{where}.content[{index}]"
        if part.type != "text":
            raise InvalidRequest(f"{place} is a part of type {part.type!r}: only text is supported", f"{place}.type")
        if not isinstance(part.text, str):
            raise InvalidRequest(f"{place}.text is missing", f"{place}.text")


def _wrong_role(message: Message, where: str) -> InvalidRequest:
    hint = "; use system" if message.role == "developer" else ""
    return InvalidRequest(
        f"{where}.role must be one of {', '.join(ROLES)}, not {message.role!r}{hint}", f"{where}.role"
    )


def _of_tools(message: Message, where: str) -> InvalidRequest:
    """For a model that knows nothing of tools."""
    return _wrong_role(message, where) if message.role == TOOL else _unsupported(f"{where}.tool_calls")


def _token_ids(ids: list[int], where: str) -> list[int]:
    if not ids:
        raise InvalidRequest(f"{where} holds no token ids", where)
    for token in ids:
        if not 0 <= token < 2**31:
            raise InvalidRequest(f"{where}: {token} is not a token id", where)
    return ids


def _params(
    request: _Sampling,
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
