"""Responses that later ones may refer to, in memory: the conversation so far, by the response's id."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import msgspec

MOST = 1024
MOST_BYTES = 64 * 2**20
"""Of bodies and conversations. The oldest go first; nothing outlives the process."""


@dataclass(frozen=True)
class Kept:
    """As JSON: Python's objects would take several times as much, and most are never asked for."""

    caller: str
    """Whose key it was made with: nobody else finds it."""
    body: msgspec.Raw
    _conversation: bytes

    @property
    def conversation(self) -> list[dict[str, Any]]:
        """Messages up to and with the response's own, without the instructions."""
        found: list[dict[str, Any]] = msgspec.json.decode(self._conversation)
        return found

    @property
    def nbytes(self) -> int:
        return memoryview(self.body).nbytes + len(self._conversation)


class ResponseStore:
    """Of one event loop."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._nbytes = 0

    def add(self, caller: str, body: dict[str, Any], conversation: list[dict[str, Any]]) -> None:
        kept = Kept(caller, msgspec.Raw(msgspec.json.encode(body)), msgspec.json.encode(conversation))
        self.remove(body["id"], caller)
        self._kept[body["id"]] = kept
        self._nbytes += kept.nbytes
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
