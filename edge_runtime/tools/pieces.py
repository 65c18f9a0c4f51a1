"""Calls of tools, which come in pieces as OpenAI's deltas hold them."""

from __future__ import annotations

from typing import Any


def add_call(calls: list[dict[str, Any]], piece: dict[str, Any]) -> None:
    """Add a piece to the calls so far: of one ``index`` the arguments join."""
    known = next((each for each in calls if each.get("index", 0) == piece.get("index", 0)), None)
    if known is None:
        calls.append({"type": "function", **piece, "function": dict(piece.get("function") or {})})
        return
    known.update({name: value for name, value in piece.items() if name not in ("function", "index")})
    function, more = known["function"], piece.get("function") or {}
    arguments = (function.get("arguments") or "") + (more.get("arguments") or "")
    function.update({**more, "arguments": arguments})


def whole(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As a message holds them: without the indices of a stream."""
    return [{name: value for name, value in call.items() if name != "index"} for call in calls]
