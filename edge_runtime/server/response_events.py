"""The events of a streamed response: typed and numbered, each item opened, filled and closed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from edge_runtime.request import Chunk
from edge_runtime.server.errors import Failure

if TYPE_CHECKING:
    from edge_runtime.server.responses import ResponseAnswer


class ResponseEvents:
    """Of one response, whose chunks ``answer`` has gathered before each call."""

    def __init__(self, answer: ResponseAnswer) -> None:
        self._answer = answer
        self._number = 0
        self._opened = False
        """The message has been."""
        self._calls: set[int] = set()
        """Indices of calls that have been opened."""

    def opening(self) -> bytes:
        body = self._answer.body()
        return self._event("created", response=body) + self._event("in_progress", response=body)

    def of(self, chunk: Chunk) -> bytes:
        data = b""
        if chunk.text:
            data += self._open_message()
            logprobs = self._answer.fresh
            data += self._event("output_text.delta", **self._in_message(), delta=chunk.text, logprobs=logprobs)
        for piece in (chunk.extra or {}).get("tool_calls", ()):
            data += self._call(piece)
        return data

    def closing(self, body: dict[str, Any]) -> bytes:
        """``body``: the whole response."""
        data = b"" if body["output"] and not self._empty(body) else self._open_message()
        for place, item in enumerate(body["output"]):
            if item["type"] == "message":
                (part,) = item["content"]
                told = {"text": part["text"], "logprobs": part["logprobs"]}
                data += self._event("output_text.done", **self._in_message(), **told)
                data += self._event("content_part.done", **self._in_message(), part=part)
            else:
                told = {"name": item["name"], "arguments": item["arguments"]}
                data += self._event("function_call_arguments.done", item_id=item["id"], output_index=place, **told)
            data += self._event("output_item.done", output_index=place, item=item)
        return data + self._event("incomplete" if body["status"] == "incomplete" else "completed", response=body)

    def _empty(self, body: dict[str, Any]) -> bool:
        """There is a message, of which nothing has come."""
        return not self._opened and any(item["type"] == "message" for item in body["output"])

    def _open_message(self) -> bytes:
        if self._opened:
            return b""
        self._opened = True
        item, part = self._answer.message_item("in_progress"), text_part("")
        place = self._in_message()
        added = self._event("output_item.added", output_index=place["output_index"], item=item)
        return added + self._event("content_part.added", **place, part=part)

    def _in_message(self) -> dict[str, Any]:
        answer = self._answer
        return {"item_id": answer.message_id, "output_index": answer.message_at or 0, "content_index": 0}

    def _call(self, piece: dict[str, Any]) -> bytes:
        index, arguments = piece.get("index", 0), (piece.get("function") or {}).get("arguments")
        before = self._answer.message_at
        place = index + (before is not None and before <= index)
        item = self._answer.call_items()[index]
        data = b""
        if index not in self._calls:
            self._calls.add(index)
            opened = {**item, "arguments": "", "status": "in_progress"}
            data += self._event("output_item.added", output_index=place, item=opened)
        if arguments:
            data += self._event(
                "function_call_arguments.delta", item_id=item["id"], output_index=place, delta=arguments
            )
        return data

    def _event(self, kind: str, **fields: Any) -> bytes:
        name = f"response.{kind}"
        body = {"type": name, "sequence_number": self._number, **fields}
        self._number += 1
        return _typed(name, body)


def failed_event(failure: Failure) -> bytes:
    told = {"code": failure.code, "message": failure.message, "param": failure.param, "sequence_number": 0}
    return _typed("error", {"type": "error", **told})


def text_part(text: str, logprobs: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _typed(name: str, body: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: ".encode() + msgspec.json.encode(body) + b"\n\n"
