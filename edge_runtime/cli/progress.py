"""Progress bars on stderr, only on a terminal."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING

from edge_runtime.exporting import DOWNLOAD

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import ProgressColumn


class Bar:
    """One bar, shown from the first call on and gone once closed."""

    def __init__(self, *, unit: str = "", counts_bytes: bool = False) -> None:
        self._unit = unit
        self._counts_bytes = counts_bytes
        self._progress: RichProgress | None = None

    def __call__(self, what: str, done: float, total: float | None) -> None:
        if self._progress is None:
            if not sys.stderr.isatty():
                return
            self._progress = self._shown()
            self._progress.add_task(what, total=total, completed=int(done))
        self._progress.update(self._progress.task_ids[0], description=what, completed=done, total=total)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._progress = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _shown(self) -> RichProgress:
        from rich import progress
        from rich.console import Console

        columns: list[ProgressColumn] = [progress.TextColumn("{task.description}"), progress.BarColumn(20)]
        if self._counts_bytes:
            columns += [progress.DownloadColumn(), progress.TransferSpeedColumn()]
        else:
            columns.append(progress.TextColumn(f"{{task.completed:.0f}} of {{task.total:.0f}}{self._unit}"))
        columns.append(progress.TimeRemainingColumn(compact=True))
        shown = progress.Progress(
            *columns,
            console=Console(stderr=True),
            transient=True,
            redirect_stdout=False,  # answers go there as they are
            redirect_stderr=False,
        )
        shown.start()
        return shown


class Bars:
    """A :data:`edge_runtime.exporting.Progress`: one bar at a time, gone when the next one starts."""

    def __init__(self) -> None:
        self._what: str | None = None
        self._bar = Bar()

    def __call__(self, what: str, done: int, total: int) -> None:
        if what != self._what:
            self.close()
            self._what = what
            self._bar = Bar(counts_bytes=True) if what == DOWNLOAD else Bar(unit=" layers")
        self._bar("downloading" if what == DOWNLOAD else f"preparing {what}", done, total)

    def close(self) -> None:
        self._bar.close()
        self._what = None

    def __enter__(self) -> Bars:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class TimeBar:
    """Seconds of a time limit gone, and what they are spent on; shown from the first call on."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._bar = Bar(unit=" s")

    def __call__(self, what: str, gone: float) -> None:
        self._bar(what, min(gone, self._limit_s), self._limit_s)

    def close(self) -> None:
        self._bar.close()
