"""Requests of Ollama's API (github.com/ollama/ollama, docs/api.md), which many desktop programs speak.

What steers Ollama's own engine (``num_ctx``, ``num_gpu``, …) is taken and has no effect here, where the device layer
decides it; what would change the answer and is not supported is refused by name.
"""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec

from edge_runtime.errors import InvalidRequest
from edge_runtime.grammar import Grammar
from edge_runtime.sampling import SamplingParams
from edge_runtime.tools.wish import ToolWish

_ROLES = ("system", "user", "assistant", "tool")
_WITHOUT_EFFECT = (
    *("num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "num_keep", "numa", "low_vram", "use_mmap"),
    *("use_mlock", "vocab_only", "f16_kv", "logits_all", "penalize_newline", "repeat_last_n", "typical_p", "tfs_z"),
)
_OPTIONS = (
    *("num_predict", "temperature", "top_k", "top_p", "min_p", "seed", "stop"),
    *("repeat_penalty", "presence_penalty", "frequency_penalty"),
)
_DURATION = re.compile(r"(-)?(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?")
KeepAlive = str | int | float | None


class OllamaMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    role: str
    content: str = ""
    images: list[Any] | None = None
    thinking: Any = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class _Common(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    model: str
    stream: bool = True
    format: Any = None
    options: dict[str, Any] | None = None
    keep_alive: KeepAlive = None
    think: Any = None

    @property
    def seconds(self) -> float | None:
        """``keep_alive``. InvalidRequest."""
        return seconds_of(self.keep_alive)

    def params(self) -> SamplingParams:
        """InvalidRequest, with the field's path."""
        given = {name: value for name, value in (self.options or {}).items() if value is not None}
        for name in given:
            if name not in (*_OPTIONS, *_WITHOUT_EFFECT):
                raise InvalidRequest(f"options.{name} is not supported by this server: leave it out", f"options.{name}")
        limit = given.get("num_predict", -1)
        stop = given.get("stop", [])
        try:
            return SamplingParams(
                temperature=given.get("temperature"),
                top_k=given.get("top_k"),
                top_p=given.get("top_p"),
                min_p=given.get("min_p"),
                repetition_penalty=given.get("repeat_penalty"),
                presence_penalty=given.get("presence_penalty", 0.0),
                frequency_penalty=given.get("frequency_penalty", 0.0),
                seed=given.get("seed"),
                max_tokens=None if limit in (-1, -2) else limit,
                stop=(stop,) if isinstance(stop, str) else stop,
                grammar=self._grammar(),
            )
        except InvalidRequest as error:
            names = {"repetition_penalty": "repeat_penalty", "max_tokens": "num_predict", "response_format": "format"}
            name = names.get(error.param or "", error.param or "")
            place = name if name == "format" else f"options.{name}"
            raise InvalidRequest(str(error).replace(error.param or "", name, 1), place) from error

    def _grammar(self) -> Grammar | None:
        if self.format in (None, ""):
            return None
        if self.format == "json":
            return Grammar.json_object()
        if isinstance(self.format, dict):
            return Grammar.json_schema(self.format)
        raise InvalidRequest("format must be json or a JSON schema", "format")

    def _check_common(self) -> None:
        if self.think not in (None, False):
            raise InvalidRequest("think is not supported by this server: leave it out", "think")


class OllamaChat(_Common, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """POST /api/chat."""

    messages: list[OllamaMessage] = []
    tools: list[dict[str, Any]] | None = None

    def check(self) -> None:
        self._check_common()
        for index, message in enumerate(self.messages):
            where = f"messages[{index}]"
            if message.role not in _ROLES:
                raise InvalidRequest(
                    f"{where}.role must be one of {', '.join(_ROLES)}, not {message.role[:100]!r}", f"{where}.role"
                )
            if message.images:
                raise InvalidRequest(f"{where}.images: only text is supported", f"{where}.images")
        ToolWish.of(self.tool_fields())

    def tool_fields(self) -> dict[str, Any]:
        return {"tools": self.tools} if self.tools else {}

    def plain(self) -> list[dict[str, Any]]:
        """Messages as chat templates take them. Ollama's calls have no ids, and arguments that are objects."""
        made: list[dict[str, Any]] = []
        calls = 0
        for message in self.messages:
            one: dict[str, Any] = {"role": message.role, "content": message.content}
            if message.tool_calls:
                one["tool_calls"] = [_call(each, calls + number) for number, each in enumerate(message.tool_calls)]
                calls += len(message.tool_calls)
            if message.role == "tool":
                one["tool_call_id"] = message.tool_call_id or "call_0"
                one |= {"name": message.tool_name} if message.tool_name else {}
            made.append(one)
        return made


def seconds_of(keep_alive: KeepAlive) -> float | None:
    """Of ``"5m"``, ``"1h30m"`` or a number of seconds; below 0: for ever. None: nothing is said. InvalidRequest."""
    if keep_alive is None or isinstance(keep_alive, int | float):
        seconds = keep_alive
    else:
        found = _DURATION.fullmatch(keep_alive)
        if found is None or not keep_alive:
            raise InvalidRequest(f"keep_alive is a duration such as 5m, not {keep_alive[:50]!r}", "keep_alive")
        sign, *parts = found.groups()
        seconds = sum(float(part or 0) * unit for part, unit in zip(parts, (3600, 60, 1), strict=True))
        seconds = -1.0 if sign else seconds
    return seconds if seconds is None or seconds >= 0 else float("inf")


def _call(call: dict[str, Any], number: int) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InvalidRequest("a tool call needs a function with a name", "messages")
    arguments = function.get("arguments") or {}
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    id = call.get("id") or f"call_{number}"
    return {"id": id, "type": "function", "function": {"name": function["name"], "arguments": text}}


class OllamaGenerate(_Common, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """POST /api/generate."""

    prompt: str = ""
    suffix: str | None = None
    images: list[Any] | None = None
    system: str | None = None
    template: str | None = None
    raw: bool = False
    context: Any = None

    def check(self) -> None:
        self._check_common()
        for name in ("suffix", "images", "template", "context"):
            if getattr(self, name):
                raise InvalidRequest(f"{name} is not supported by this server: leave it out", name)

    def messages(self) -> list[dict[str, Any]]:
        told = [{"role": "system", "content": self.system}] if self.system else []
        return [*told, {"role": "user", "content": self.prompt}]


class OllamaShow(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """POST /api/show."""

    model: str = ""
    name: str = ""
    verbose: bool = False

    def check(self) -> None:
        if not (self.model or self.name):
            raise InvalidRequest("model is missing", "model")


class OllamaEmbed(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """POST /api/embed."""

    model: str
    input: str | list[str]
    truncate: bool = True
    dimensions: int | None = None
    options: dict[str, Any] | None = None
    keep_alive: KeepAlive = None

    def check(self) -> None:
        if self.dimensions is not None and self.dimensions < 1:
            raise InvalidRequest("dimensions must be at least 1", "dimensions")
