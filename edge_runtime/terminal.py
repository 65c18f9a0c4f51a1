"""Text from elsewhere for a terminal: names, messages and answers of models, none of which it may obey."""

from __future__ import annotations

_CONTROLS = {
    code: "\N{REPLACEMENT CHARACTER}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"
}


def harmless(text: str) -> str:
    """Without control characters (C0 and C1 but tab and newline): an escape sequence could write to the clipboard, or
    hide what was said before."""
    return text.translate(_CONTROLS)
