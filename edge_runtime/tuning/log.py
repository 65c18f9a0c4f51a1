"""The tuning log: one file in the cache, with every trial of the latest runs.

A run speaks for the files of a model's variant, a device and a workload, and only as long as the processor and the
versions of the engines are those it was made with.
"""

from __future__ import annotations

import logging
from pathlib import Path

from edge_runtime.measurements import Workload
from edge_runtime.package import Variant
from edge_runtime.record_file import RecordFile
from edge_runtime.tuning.records import Run, Setup
from edge_runtime.tuning.space import problem

KEPT = 40
"""Runs; the oldest go first."""
_log = logging.getLogger("edge_glm.tuning")


class TuningLog:
    """Reading never fails: what cannot be used counts as nothing tried, and is said in the program's log."""

    def __init__(self, file: Path, machine: str) -> None:
        """``machine``: :func:`edge_runtime.machine.fingerprint`."""
        self._runs = RecordFile(file, Run, KEPT, _log, "tune again to replace it")
        self._machine = machine

    def keep(self, run: Run) -> None:
        """In place of an earlier state of the same run. StorageError as :meth:`RecordFile.change`."""
        self._runs.change(lambda runs: [*(each for each in runs if each.id != run.id), run])

    def best(self, variant: Variant, device: str, workload: Workload) -> Run | None:
        """The latest run that decided for ``device`` (:attr:`Run.best`); None if there is none that counts here."""
        runs = self._about({device: variant.digest}, workload)
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
        return [
            run for run in self._runs.read() if run.workload == workload and variants.items() & run.variants.items()
        ]
