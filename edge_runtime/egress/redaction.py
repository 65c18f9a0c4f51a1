"""Placeholders in the place of what should not leave, and back again in the answer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
from msgspec.structs import replace

from edge_runtime.egress.detectors import Detector, find
from edge_runtime.request import Chunk

_KEPT = frozenset({"model", "role", "type"})
"""Keys of a request whose values are no text of anybody's."""


class Redaction:
    """Of one request. The same text always gets the same placeholder, ``[EMAIL_1]``, numbered as they come, so that a
    conversation that grows keeps its own."""

    def __init__(self, detectors: Sequence[Detector]) -> None:
        self._detectors = detectors
        self._placeholders: dict[str, str] = {}
        self._originals: dict[str, str] = {}
        self._counts: dict[str, int] = {}
        self._taken: set[str] = set()

    @property
    def originals(self) -> Mapping[str, str]:
        """Placeholder → what it stands for."""
        return self._originals

    def apply(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """A request's JSON with placeholders in all its texts; keys stay."""
        self._taken = set(re.findall(r"\[[A-Z0-9]+_\d+\]", str(body)))  # the text's own stay what they are
        return {key: value if key in _KEPT else self._in(value) for key, value in body.items()}

    def _in(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._text(value)
        if isinstance(value, Mapping):
            return {key: each if key in _KEPT else self._in(each) for key, each in value.items()}
        return [self._in(each) for each in value] if isinstance(value, list | tuple) else value

    def _text(self, text: str) -> str:
        parts, end = [], 0
        for span in find(text, self._detectors):
            parts += [text[end : span.start], self._placeholder(text[span.start : span.end], span.kind)]
            end = span.end
        return "".join([*parts, text[end:]])

    def _placeholder(self, original: str, kind: str) -> str:
        known = self._placeholders.get(original)
        if known is not None:
            return known
        while True:
            number = self._counts[kind] = self._counts.get(kind, 0) + 1
            name = f"[{kind}_{number}]"
            if name not in self._taken:
                break
        self._placeholders[original] = name
        self._originals[name] = original
        return name


class Restorer:
    """Puts originals back into an answer that comes in pieces. The pieces it gives join to what restoring the whole
    answer at once gives; what may be the beginning of a placeholder waits."""

    def __init__(self, originals: Mapping[str, str]) -> None:
        self._originals = originals
        names = "|".join(map(re.escape, originals))
        self._pattern = re.compile(names) if names else None
        self._held = ""

    def add(self, text: str) -> str:
        if self._pattern is None:
            return text
        text, parts, end = self._held + text, [], 0
        for match in self._pattern.finditer(text):
            parts += [text[end : match.start()], self._originals[match[0]]]
            end = match.end()
        rest, self._held = text[end:], ""
        start = rest.rfind("[")
        if start >= 0 and any(name.startswith(rest[start:]) for name in self._originals):
            rest, self._held = rest[:start], rest[start:]
        return "".join([*parts, rest])

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


class ChunkRestorer:
    """:class:`Restorer` over the chunks of an answer: the text of each completion, and the arguments of each of its
    tool calls, apart. ``as_json``: the text is JSON, so that originals are written as in its strings; arguments always
    are."""

    def __init__(self, originals: Mapping[str, str], *, as_json: bool = False) -> None:
        quoted = {name: msgspec.json.encode(original).decode()[1:-1] for name, original in originals.items()}
        self._nothing = not originals
        self._texts = quoted if as_json else originals
        self._arguments = quoted
        self._restorers: dict[tuple[int, int | None], Restorer] = {}

    def add(self, chunk: Chunk) -> Iterator[Chunk]:
        """What of it can be said now; at a completion's end all that has waited comes first."""
        if self._nothing:
            yield chunk
            return
        text = self._of(chunk.index, None).add(chunk.text)
        calls = [self._call(chunk.index, call) for call in (chunk.extra or {}).get("tool_calls", ())]
        if chunk.finish_reason is not None:
            text += self._of(chunk.index, None).flush()
            for (index, number), restorer in self._restorers.items():
                rest = restorer.flush() if index == chunk.index and number is not None else ""
                if rest:
                    calls.append({"index": number, "function": {"arguments": rest}})
        extra = {**(chunk.extra or {}), **({"tool_calls": calls} if calls else {})}
        if text or extra or chunk.finish_reason is not None:
            yield replace(chunk, text=text, extra=extra or None)

    def _call(self, index: int, call: Any) -> Any:
        """A piece of a tool call, as OpenAI's deltas hold it."""
        function = call.get("function") if isinstance(call, Mapping) else None
        arguments = function.get("arguments") if isinstance(function, Mapping) else None
        if not isinstance(arguments, str):
            return call
        restored = self._of(index, call.get("index", 0)).add(arguments)
        return {**call, "function": {**(function or {}), "arguments": restored}}

    def _of(self, index: int, call: int | None) -> Restorer:
        key = (index, call)
        if key not in self._restorers:
            self._restorers[key] = Restorer(self._texts if call is None else self._arguments)
        return self._restorers[key]
