"""Finds calls in an answer as it comes: content goes on as text, calls as pieces with their arguments streamed."""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Callable, Sequence
from typing import Any, Literal

from edge_runtime.detokenizer import overlap
from edge_runtime.tools.formats import CallFormat

Pieces = list[dict[str, Any]]
State = Literal["text", "head", "arguments", "after", "list", "free"]
_BLANK = " \n\t\r"
_ALPHABET = string.ascii_letters + string.digits
_LONGEST_HEAD = 512
"""Characters of a call before its arguments begin; more is no call."""


class CallReader:
    """Of one completion. What does not turn out to be a call stays text, as it stands."""

    def __init__(self, form: CallFormat, names: Sequence[str]) -> None:
        self._form = form
        self._openings = form.openings(names)
        key = '"name"' if not form.at_start else ""  # there the opening has it
        before = rf"\{{\s*{key}\s*:\s*" if key else r"\s*"
        self._head = re.compile(rf'{before}("(?:[^"\\]|\\.)*")\s*,\s*"{form.arguments}"\s*:')
        self._steps: dict[State, Callable[[], bool]] = {
            "text": self._find_opening,
            "head": self._read_head,
            "arguments": self._read_arguments,
            "after": self._read_after,
            "list": self._read_list,
            "free": self._pass_on,
        }
        self._state: State = "text"
        self._opening = ""
        self._buffer = ""
        """Read, and not yet known to be one thing or the other."""
        self._marks: list[str] = []
        """What has to come before the next call or text."""
        self._value = _JsonEnd()
        self._count = 0
        self._listing = False
        """Inside a list of calls."""
        self._blanks: str | None = ""
        """Blanks that nothing but blanks came before; None: something did. Beside calls they are no content."""
        self._content = ""
        self._pieces: Pieces = []

    @property
    def called(self) -> bool:
        return self._count > 0

    def add(self, text: str) -> tuple[str, Pieces]:
        """(content, pieces of calls) that have become certain."""
        self._content, self._pieces = "", []
        self._buffer += text
        while self._steps[self._state]():
            pass
        return self._content, self._pieces

    def flush(self) -> tuple[str, Pieces]:
        """At the end: what was held back. A first call that is cut off before its arguments is text."""
        self.add("")
        if self._state in ("text", "free"):
            self._say(self._buffer)
        elif self._state == "head" and not self.called:
            self._say(self._opening + self._buffer)
        self._buffer = ""
        return self._content, self._pieces

    # --- steps: True if there may be more to do -----------------------------------------------------------------------

    def _find_opening(self) -> bool:
        if self._form.at_start:
            return self._find_at_start()
        buffer = self._buffer
        found = [(place, each) for each in self._openings if (place := buffer.find(each)) >= 0]
        if not found:
            keep = max(overlap(buffer, each) for each in self._openings)
            self._say(buffer[: len(buffer) - keep])
            self._buffer = buffer[len(buffer) - keep :]
            return False
        place, opening = min(found)
        self._say(buffer[:place])
        self._open(opening, buffer[place + len(opening) :])
        return True

    def _find_at_start(self) -> bool:
        buffer = self._buffer.lstrip(_BLANK)
        opening = next((each for each in self._openings if buffer.startswith(each)), None)
        if opening is not None:
            self._open(opening, buffer[len(opening) :])
        elif not any(each.startswith(buffer) for each in self._openings):
            self._state = "free"
        else:
            return False
        return True

    def _open(self, opening: str, rest: str) -> None:
        self._opening, self._buffer, self._state = opening, rest, "head"
        self._listing = False

    def _read_head(self) -> bool:
        form = self._form
        if form.bare_name:
            self._begin(self._opening[:-1], 0)
            return True
        buffer = self._buffer.lstrip(_BLANK)
        blanks = len(self._buffer) - len(buffer)
        if form.listed and not self._listing and buffer.startswith("["):
            self._listing = True
            self._opening += self._buffer[: blanks + 1]
            self._buffer = buffer[1:]
            return True
        found = self._head.match(buffer) if self._listing or not form.listed else None
        if found is not None:
            self._begin(json.loads(found[1]), blanks + found.end())
            return True
        first = "[" if form.listed and not self._listing else '"' if form.at_start else "{"
        if buffer[:1] in ("", first) and len(buffer) <= _LONGEST_HEAD:
            return False
        self._say(self._opening)  # whatever this is, it is no call
        self._state = "free" if form.at_start else "text"
        return True

    def _begin(self, name: str, end: int) -> None:
        form = self._form
        id = form.id_prefix + "".join(secrets.choice(_ALPHABET) for _ in range(form.id_length))
        function = {"name": name, "arguments": ""}
        self._pieces.append({"index": self._count, "id": id, "type": "function", "function": function})
        self._count += 1
        self._buffer = self._buffer[end:]
        self._state, self._value = "arguments", _JsonEnd()

    def _read_arguments(self) -> bool:
        if not self._value.begun:
            self._buffer = self._buffer.lstrip(_BLANK)
        taken = self._value.take(self._buffer)
        if taken:
            piece = {"index": self._count - 1, "function": {"arguments": self._buffer[:taken]}}
            self._pieces.append(piece)
        self._buffer = self._buffer[taken:]
        if not self._value.done:
            return False
        form = self._form
        self._marks = [] if form.bare_name else ["}"]
        self._marks += [form.closing] if form.closing and not form.listed else []
        self._state = "after"
        return True

    def _read_after(self) -> bool:
        while self._marks:
            buffer = self._buffer.lstrip(_BLANK)
            if buffer.startswith(self._marks[0]):
                self._buffer = buffer[len(self._marks.pop(0)) :]
            elif self._marks[0].startswith(buffer):
                return False
            else:
                self._marks = []  # it goes on otherwise than calls do
                self._listing = False
        self._state = "list" if self._listing else "free" if self._form.at_start else "text"
        self._blanks = ""
        return True

    def _read_list(self) -> bool:
        buffer = self._buffer.lstrip(_BLANK)
        if not buffer:
            return False
        if buffer.startswith(","):
            self._buffer, self._state = buffer[1:], "head"
            return True
        self._listing = False
        self._marks = ["]", *filter(None, [self._form.closing])]
        self._state = "after"
        return True

    def _pass_on(self) -> bool:
        self._say(self._buffer)
        self._buffer = ""
        return False

    def _say(self, text: str) -> None:
        if self._blanks is not None:
            text = self._blanks + text
            if not text.strip(_BLANK):
                self._blanks = text
                return
            self._blanks = None
        self._content += text


class _JsonEnd:
    """Follows a JSON value to its end."""

    def __init__(self) -> None:
        self.begun = self.done = False
        self._depth = 0
        self._quoted = self._escaped = False

    def take(self, text: str) -> int:
        """How many characters of ``text`` belong to the value."""
        for place, character in enumerate(text):
            self.begun = True
            if self._quoted:
                self._quoted = self._escaped or character != '"'
                self._escaped = character == "\\" and not self._escaped
            elif character == '"':
                self._quoted = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]" or (self._depth == 0 and character == ","):
                ends_before = self._depth == 0  # of what is around the value
                self._depth -= 1
                if self._depth <= 0:
                    self.done = True
                    return place + (not ends_before)
        return len(text)
