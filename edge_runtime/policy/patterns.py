"""Regular expressions from policies, in time that grows with the text only.

Python's ``re`` backtracks: a pattern such as ``(a+)+$`` takes for ever on a text that an attacker may choose. RE2
(google-re2, BSD-3) knows no such pattern; what it cannot do (look-around, back-references) is refused when the policy
is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from edge_runtime.errors import PolicyError

MAX_PATTERN = 1000
"""Characters."""
MAX_MEMORY = 4 * 2**20
"""Bytes that a compiled pattern and its automaton may take."""


class Pattern:
    """A compiled pattern. PolicyError names ``where`` it stands."""

    def __init__(self, source: str, where: str, *, ignore_case: bool = False) -> None:
        import re2  # late: only who has patterns needs it

        if not source or len(source) > MAX_PATTERN:
            raise PolicyError(f"{where}: a pattern has 1 to {MAX_PATTERN} characters, not {len(source)}")
        options = re2.Options()
        options.log_errors = False
        options.max_mem = MAX_MEMORY
        options.case_sensitive = not ignore_case
        try:
            self._compiled: Any = re2.compile(source, options=options)
        except re2.error as error:
            what = error.args[0].decode(errors="replace") if error.args and isinstance(error.args[0], bytes) else error
            raise PolicyError(
                f"{where}: {source!r} is no pattern (RE2 syntax, without look-around and back-references): {what}"
            ) from error
        self.source = source

    def found(self, text: str) -> bool:
        return self._compiled.search(text) is not None

    def spans(self, text: str) -> Iterator[tuple[int, int]]:
        """Start and end of every match that is not empty, left to right."""
        for match in self._compiled.finditer(text):
            if match.end() > match.start():
                yield match.start(), match.end()


def words_pattern(words: tuple[str, ...], where: str) -> Pattern:
    """Any of ``words`` on its own, in any case."""
    import re2

    escaped = "|".join(re2.escape(word) for word in words)
    return Pattern(rf"(?:^|[^\pL\pN_])(?:{escaped})(?:[^\pL\pN_]|$)", where, ignore_case=True)
