"""The ``traceparent`` header of W3C's Trace Context (level 1): what a caller's own trace is called."""

from __future__ import annotations

import re

_FORM = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


def trace_parent(header: str | None) -> tuple[str | None, str | None, bool]:
    """(trace id, id of the caller's span, whether the caller records it); (None, None, True) where there is none, or it
    is malformed, which the specification wants passed over."""
    found = _FORM.fullmatch(header or "")
    if found is None or found[1] == "ff" or (found[1] == "00" and found[5]):
        return None, None, True
    trace, parent = found[2], found[3]
    if not int(trace, 16) or not int(parent, 16):
        return None, None, True
    return trace, parent, bool(int(found[4], 16) & 1)
