"""What single requests took on this machine, as ``edge-glm bench`` and ``tune`` measured it: one file in the cache.

An observation speaks for the files of a model's variant, a device and the way it was opened, and only as long as the
processor and the versions of the engines are those it was made with.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

import msgspec

from devices.base import DecoderOptions
from edge_runtime.disk import why
from edge_runtime.errors import StorageError
from edge_runtime.locks import file_lock
from edge_runtime.package import Variant
from edge_runtime.tuning.log import digest

KEPT = 100
"""Runs in the file; the oldest go first."""
KEPT_EACH = 3
"""Runs of one subject: several, so that what drifts from hour to hour is part of the spread."""
LARGEST = 16 << 20
"""Bytes that are read: several times what a full file has."""
_log = logging.getLogger("edge_glm.timing")


class FirstToken(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="first"):
    """From a prompt to its first token (TTFT)."""

    prompt: int
    """Tokens."""
    cached: int = 0
    """Of them, those whose keys and values were there already."""
    beside: int = 0
    """Other sequences that were decoding meanwhile."""
    held: int = 0
    """Tokens of their KV cache, all together."""
    seconds: float
    """The least of several times: others' work on the machine only adds to it."""
    slowest: float | None = None
    """The most of them, if there were several."""


class EachToken(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="each"):
    """From one token to the next (TPOT), nothing but decoding going on."""

    batch: int = 1
    """Sequences that decode together."""
    held: int
    """Tokens of their KV cache, all together."""
    seconds: float
    slowest: float | None = None
    """Both as above."""


Observation = FirstToken | EachToken


def merged(rounds: Sequence[Sequence[Observation]]) -> list[Observation]:
    """One of each place in ``rounds``, which timed the same in the same order. ValueError if they did not."""
    found = []
    for same in zip(*rounds, strict=True):
        best = min(same, key=lambda each: each.seconds)
        slowest = max(each.seconds for each in same) if len(same) > 1 else None
        found.append(msgspec.structs.replace(best, slowest=slowest))
    return found


class Subject(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was timed: times of one say nothing of another."""

    variant: str
    """:func:`edge_runtime.tuning.log.digest` of its files."""
    device: str
    """``engine:hardware``, as really opened."""
    opened: str
    """What of the options decides how fast it is, in words."""
    machine: str
    """:func:`edge_runtime.machine.fingerprint`."""

    @classmethod
    def of(cls, variant: Variant, device: str, options: DecoderOptions, machine: str) -> Subject:
        said = {
            "chunk": options.prefill_chunk,
            "threads": options.threads,
            "KV cache": options.kv_type,
            "max prompt": options.max_prompt,
            "batch invariant": options.batch_invariant or None,
            **dict(sorted(options.properties.items())),
        }
        opened = ", ".join(f"{name} {value}" for name, value in said.items() if value is not None)
        return cls(digest(variant), device, opened, machine)


class TimedRun(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The observations of one opening of a model."""

    subject: Subject
    chunk: int
    """Tokens of a prompt in one step, at most."""
    created: str
    observations: list[Observation]


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    schema_version: Literal[1] = 1
    runs: list[TimedRun]


class Observations:
    """The file. Reading never fails: what cannot be used counts as nothing measured, and is said in the log."""

    def __init__(self, file: Path) -> None:
        self._file = file

    @property
    def broken(self) -> Path:
        """Where a file goes that could not be read, once there is a new one to take its place."""
        return self._file.with_suffix(".broken.json")

    def of(self, subject: Subject) -> list[TimedRun]:
        """Oldest first."""
        try:
            return [run for run in self._read() if run.subject == subject]
        except (OSError, msgspec.DecodeError) as error:
            _log.warning("times in %s are not used: %s; bench again to replace them", self._file, error)
            return []

    def keep(self, run: TimedRun) -> None:
        """Beside the latest of its subject. A file that cannot be read is put aside. StorageError if this one cannot be
        written."""
        fresh = self._file.with_suffix(".new")
        try:
            with file_lock(self._file.with_suffix(".lock")):
                before = self._read_or_put_aside()
                same = [each for each in before if each.subject == run.subject]
                gone = same[: max(len(same) - KEPT_EACH + 1, 0)]
                runs = [*(each for each in before if each not in gone), run]
                fresh.write_bytes(msgspec.json.encode(_File(runs=runs[-KEPT:])))
                fresh.replace(self._file)
        except OSError as error:
            raise StorageError(f"cannot write {self._file}: {why(error)}") from error
        finally:
            with suppress(OSError):
                fresh.unlink()

    def _read(self) -> list[TimedRun]:
        """OSError, msgspec.DecodeError."""
        try:
            if self._file.stat().st_size > LARGEST:
                raise msgspec.DecodeError(f"it is larger than {LARGEST >> 20} MiB")
            return msgspec.json.decode(self._file.read_bytes(), type=_File).runs
        except FileNotFoundError:
            return []

    def _read_or_put_aside(self) -> list[TimedRun]:
        try:
            return self._read()
        except msgspec.DecodeError as error:
            self._file.replace(self.broken)
            _log.warning("times in %s could not be read and are in %s now: %s", self._file, self.broken, error)
            return []
