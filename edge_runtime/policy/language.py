"""In which language a text is, by Chromium's CLD2 (pycld2, Apache-2.0: 20 µs for a sentence, 7 MB)."""

from __future__ import annotations

from functools import cache
from typing import Any

MOST = 400
"""Characters that are looked at."""


@cache
def _cld2() -> Any:
    """None where it is not installed (the ``cloud`` extra)."""
    try:
        import pycld2
    except ImportError:
        return None
    return pycld2


def known_languages() -> frozenset[str]:
    """ISO 639-1 codes, and CLD2's own for scripts; empty where CLD2 is not installed."""
    cld2 = _cld2()
    return frozenset() if cld2 is None else frozenset(code for _, code in cld2.LANGUAGES)


def language_of(text: str) -> str | None:
    """ISO 639-1; None where it is not sure."""
    cld2 = _cld2()
    if cld2 is None:
        return None
    head = text[:MOST]
    try:
        reliable, _, ((_, code, _, _), *_) = cld2.detect(head)
    except (cld2.error, UnicodeEncodeError):  # control characters or halves of surrogate pairs, which it does not take
        head = "".join(character if character.isprintable() else " " for character in head)
        try:
            reliable, _, ((_, code, _, _), *_) = cld2.detect(head)
        except cld2.error:
            return None
    return str(code) if reliable and code != "un" else None
