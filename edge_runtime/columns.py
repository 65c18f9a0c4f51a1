"""Rows of text in columns, for a terminal: made by rich, which knows how wide characters are."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from edge_runtime.terminal import harmless

_WIDE = 10_000
"""Columns: lines are never wrapped, so that what is piped stays one line a row."""


def columns(rows: Sequence[Sequence[str]], align: str = "lr", *, head: bool = False) -> str:
    """``rows`` of as many cells each, to the left or to the right as ``align`` says (``l`` or ``r`` for each column;
    its last letter goes on). ``head``: the first row names the columns, bold where a terminal shows it."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not rows:
        return ""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    for side in align.ljust(len(rows[0]), align[-1]):
        table.add_column(justify="left" if side == "l" else "right", no_wrap=True)
    for index, row in enumerate(rows):
        table.add_row(*(Text(harmless(cell)) for cell in row), style="bold" if head and index == 0 else "")
    console = Console(width=_WIDE, force_terminal=sys.stdout.isatty(), highlight=False)
    with console.capture() as text:
        console.print(table)
    return "\n".join(line.rstrip() for line in text.get().splitlines())
