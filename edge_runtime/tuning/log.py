"""The tuning log: one file in the cache, with every trial of the latest runs.

A run speaks for the files of a model's variant, a device and a workload, and only as long as the processor and the
versions of the engines are those it was made with.
"""

from __future__ import annotations

import hashlib
import logging
from contextlib import suppress
from pathlib import Path
from typing import Literal

import msgspec

from edge_runtime.disk import why
from edge_runtime.errors import StorageError
from edge_runtime.locks import file_lock
from edge_runtime.measurements import Workload
from edge_runtime.package import Variant
from edge_runtime.tuning.records import Run, Setup
from edge_runtime.tuning.space import problem

KEPT = 40
"""Runs; the oldest go first."""
LARGEST = 16 << 20
"""Bytes that are read: ten times what a log of :data:`KEPT` long runs has."""
_log = logging.getLogger("edge_glm.tuning")


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    schema_version: Literal[1] = 1
    runs: list[Run]


class TuningLog:
    """Reading never fails: what cannot be used counts as nothing tried, and is said once in the program's log."""

    def __init__(self, file: Path, machine: str) -> None:
        """``machine``: :func:`edge_runtime.machine.fingerprint`."""
        self._file = file
        self._machine = machine

    def keep(self, run: Run) -> None:
        """In place of an earlier state of the same run. StorageError if it cannot be written."""
        with file_lock(self._file.with_suffix(".lock")):
            kept = [each for each in self._read() if (each.started, each.model) != (run.started, run.model)]
            fresh = self._file.with_suffix(".new")
            try:
                fresh.write_bytes(msgspec.json.encode(_File(runs=[*kept, run][-KEPT:])))
                fresh.replace(self._file)
            except OSError as error:
                raise StorageError(f"cannot write {self._file}: {why(error)}") from error
            finally:
                with suppress(OSError):
                    fresh.unlink()

    def best(self, variant: Variant, device: str, workload: Workload) -> Run | None:
        """The latest run that decided for ``device`` (:attr:`Run.best`); None if there is none that counts here."""
        runs = self._about({device: digest(variant)}, workload)
        decided = [run for run in runs if run.best is not None and run.best.device == device]
        ours = [run for run in decided if run.machine == self._machine]
        if not ours and decided:
            _log.warning(
                "what edge-glm tune found for %s on %s is not used: it was found on another machine or with other "
                "versions (%s); tune again",
                decided[-1].model,
                device,
                decided[-1].machine,
            )
        if not ours:
            return None
        assert ours[-1].best is not None
        trouble = problem(ours[-1].best)
        if trouble is not None:
            _log.warning("what edge-glm tune found for %s on %s is not used: %s", ours[-1].model, device, trouble)
            return None
        return ours[-1]

    def found(self, variants: dict[str, str], workload: Workload) -> tuple[Setup, ...]:
        """What runs here ended with, decided or not, the latest first. ``variants``: see :attr:`Run.variants`."""
        runs = [run for run in self._about(variants, workload) if run.machine == self._machine]
        ended = [(run, run.best or run.candidate) for run in reversed(runs)]
        ours = [each for run, each in ended if variants.get(each.device) == run.variants.get(each.device)]
        usable = [each for each in ours if problem(each) is None]
        return tuple(each for index, each in enumerate(usable) if each not in usable[:index])

    def _about(self, variants: dict[str, str], workload: Workload) -> list[Run]:
        """Those that tried one of the variants, oldest first."""
        return [run for run in self._read() if run.workload == workload and variants.items() & run.variants.items()]

    def _read(self) -> list[Run]:
        try:
            if self._file.stat().st_size > LARGEST:
                raise msgspec.DecodeError(f"it is larger than {LARGEST >> 20} MiB")
            return msgspec.json.decode(self._file.read_bytes(), type=_File).runs
        except FileNotFoundError:
            return []
        except (OSError, msgspec.DecodeError, RecursionError) as error:
            _log.warning("the tuning log %s is not used: %s; tune again to replace it", self._file, error)
            return []


def digest(variant: Variant) -> str:
    """Of all its files."""
    known = sorted((entry.path, entry.sha256) for entry in variant.files)
    return hashlib.sha256(repr(known).encode()).hexdigest()[:16]
