"""How an open model is, for those who look after it."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec


class Condition(msgspec.Struct, frozen=True):
    """Of a model that is open."""

    failure: str | None = None
    """Why it answers no more, though nobody has closed it: only a new process can help."""
    aside: Mapping[str, str] = {}
    """Devices that were put aside, and why."""
    memory: str | None = None
    """What is tight."""
