"""Text from elsewhere for a terminal: names, messages and answers of models, none of which it may obey."""

from __future__ import annotations

_CONTROLS = [code for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"]
_TURNED = [*range(0x202A, 0x202F), *range(0x2066, 0x206A)]
"""What makes text run the other way, or end that: lines can be made to read otherwise than they are (Boucher and
Anderson, Trojan Source, 2021)."""
_SHOWN = dict.fromkeys((*_CONTROLS, *_TURNED), "\N{REPLACEMENT CHARACTER}")


def harmless(text: str) -> str:
    """Without control characters (C0 and C1 but tab and newline), of which an escape sequence could write to the
    clipboard or hide what was said before, and without those that turn the direction of text."""
    return text.translate(_SHOWN)
