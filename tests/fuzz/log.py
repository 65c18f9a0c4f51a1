"""What a server logs with a traceback is a bug, even if its client was told politely."""

from __future__ import annotations

import logging
from types import TracebackType

_LOGGERS = ("", "asyncio", "edge_glm", "uvicorn.error")


class Tracebacks(logging.Handler):
    """Gathers the errors that are logged with one, while it is entered."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            self.found.append(f"the log has {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        elif "never retrieved" in record.getMessage():
            self.found.append(f"the log has {record.getMessage()[:200]}")

    def take(self) -> str | None:
        """The first since the last call."""
        first = self.found[0] if self.found else None
        self.found.clear()
        return first

    def __enter__(self) -> Tracebacks:
        for name in _LOGGERS:
            logging.getLogger(name).addHandler(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in _LOGGERS:
            logging.getLogger(name).removeHandler(self)
