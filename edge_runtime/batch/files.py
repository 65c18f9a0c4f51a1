"""The two files of a batch: a request a line, an answer a line, in one order."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from edge_runtime.disk import why
from edge_runtime.errors import ConfigError
from edge_runtime.package import storage_errors

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings")
MOST = 50_000
"""Requests of a file, as OpenAI takes."""


class Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A request."""

    custom_id: str
    url: str
    body: dict[str, Any]
    method: str = "POST"


class _Answered(msgspec.Struct, frozen=True):
    """As much of an answer as tells which request it is of."""

    custom_id: str


def read_requests(file: Path) -> Iterator[Line]:
    """Line by line. ConfigError with the line's number for one that is no request; empty ones are passed over."""
    try:
        with file.open("rb") as opened:
            for number, text in enumerate(opened, start=1):
                if text.strip():
                    yield _line(text, f"{file}, line {number}")
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {why(error)}") from error


def check_requests(file: Path) -> tuple[int, list[str]]:
    """How many there are, and the models that they name. ConfigError as for :func:`read_requests`, and for none, too
    many, or two of one ``custom_id``."""
    seen: set[str] = set()
    models: dict[str, None] = {}
    for count, line in enumerate(read_requests(file), start=1):
        if line.custom_id in seen:
            raise ConfigError(f"{file}: two requests have the custom_id {line.custom_id!r}")
        seen.add(line.custom_id)
        models[line.body["model"]] = None
        if count > MOST:
            raise ConfigError(f"{file} has more than {MOST:,} requests: split it")
    if not seen:
        raise ConfigError(f"{file} has no requests")
    return len(seen), list(models)


def _line(text: bytes, where: str) -> Line:
    try:
        line = msgspec.json.decode(text, type=Line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{where}: {str(error).replace('`', '')}") from error
    if line.method != "POST" or line.url not in PATHS:
        raise ConfigError(f"{where}: {line.method} {line.url} is not one of POST {', '.join(PATHS)}")
    if not isinstance(line.body.get("model"), str):
        raise ConfigError(f"{where}: the body names no model")
    if line.body.get("stream"):
        raise ConfigError(f"{where}: answers of a batch do not stream")
    return line


class Answers:
    """The file of answers, appended to. Each line is on the disk before the next is written."""

    def __init__(self, file: Path, requests: Path) -> None:
        """Goes on behind the answers that are there, which must be of the first ``requests``: ConfigError otherwise. A
        line that was cut off is written anew. StorageError."""
        self._file = file
        with storage_errors(f"cannot write {file}"):
            file.touch()
            self.done, self._end = self._count(requests)
            self._opened = file.open("r+b", buffering=0)  # so that nothing is left to be written when it is closed
            try:
                self._cut()
            except BaseException:
                self.close()
                raise

    def _count(self, requests: Path) -> tuple[int, int]:
        """Whole answers, and their bytes."""
        whole = count = 0
        asked = read_requests(requests)
        with self._file.open("rb") as opened:
            for text in opened:
                if not text.endswith(b"\n"):
                    break
                try:
                    answered = msgspec.json.decode(text, type=_Answered).custom_id
                except (msgspec.DecodeError, RecursionError):
                    answered = None
                request = next(asked, None)
                if request is None or answered != request.custom_id:
                    raise ConfigError(
                        f"{self._file} holds other answers than to {requests} (line {count + 1}): name another file"
                    )
                whole, count = whole + len(text), count + 1
        return count, whole

    def write(self, answer: dict[str, Any]) -> None:
        """StorageError, and the file ends with the answer before."""
        line = msgspec.json.encode(answer) + b"\n"
        with storage_errors(f"cannot write {self._file}"):
            try:
                written = 0
                while written < len(line):
                    written += self._opened.write(line[written:])
                os.fsync(self._opened.fileno())
            except BaseException:
                with suppress(OSError):  # or the next to open it does
                    self._cut()
                raise
        self._end += len(line)
        self.done += 1

    def _cut(self) -> None:
        """Behind the last whole answer."""
        self._opened.seek(self._end)
        self._opened.truncate()

    def close(self) -> None:
        self._opened.close()
