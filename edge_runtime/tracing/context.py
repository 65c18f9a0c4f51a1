"""The ``traceparent`` header of W3C's Trace Context (level 1): what a caller's own trace is called."""

from __future__ import annotations

import re

_FORM = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(-.*)?")


def trace_parent(header: str | None) -> tuple[str | None, str | None]:
    """(trace id, id of the caller's span); (None, None) where there is none, or it is malformed, which the
    specification wants passed over."""
    found = _FORM.fullmatch(header or "")
    if found is None or found[1] == "ff" or (found[1] == "00" and found[4]):
        return None, None
    trace, parent = found[2], found[3]
    return (None, None) if not int(trace, 16) or not int(parent, 16) else (trace, parent)
