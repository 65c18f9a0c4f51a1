"""Responses that later ones may refer to, in memory: the conversation so far, by the response's id."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import msgspec

MOST = 1024
MOST_BYTES = 64 * 2**20
"""Of bodies and conversations, as JSON. The oldest go first; nothing outlives the process."""


@dataclass(frozen=True)
class Kept:
    caller: str
    """Whose key it was made with: nobody else finds it."""
    body: dict[str, Any]
    conversation: list[dict[str, Any]]
    """Messages up to and with the response's own, without the instructions."""
    nbytes: int = 0


class ResponseStore:
    """Of one event loop."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._nbytes = 0

    def add(self, caller: str, body: dict[str, Any], conversation: list[dict[str, Any]]) -> None:
        nbytes = len(msgspec.json.encode([body, conversation]))
        self.remove(body["id"], caller)
        self._kept[body["id"]] = Kept(caller, body, conversation, nbytes)
        self._nbytes += nbytes
        while self._kept and (len(self._kept) > MOST or self._nbytes > MOST_BYTES):
            _, oldest = self._kept.popitem(last=False)
            self._nbytes -= oldest.nbytes

    def get(self, id: str, caller: str) -> Kept | None:
        kept = self._kept.get(id)
        return kept if kept is not None and kept.caller == caller else None

    def remove(self, id: str, caller: str) -> bool:
        """Whether there was one."""
        if self.get(id, caller) is None:
            return False
        self._nbytes -= self._kept.pop(id).nbytes
        return True
