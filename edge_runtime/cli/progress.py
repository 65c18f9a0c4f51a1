"""Progress bars on stderr, only on a terminal."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from tqdm import tqdm

from edge_runtime.store import DOWNLOAD


class Bars:
    """A :data:`edge_runtime.store.Progress`: one bar at a time, gone when the next one starts."""

    def __init__(self) -> None:
        self._what: str | None = None
        self._bar: Any = None

    def __call__(self, what: str, done: int, total: int) -> None:
        if what != self._what:
            self.close()
            self._what = what
            download = what == DOWNLOAD
            self._bar = tqdm(
                total=total,
                desc="downloading" if download else f"preparing {what}",
                unit="B" if download else " layers",
                unit_scale=download,
                leave=False,
                disable=None,  # no bar unless stderr is a terminal
            )
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._what = self._bar = None

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
        self._bar: Any = None

    def __call__(self, what: str, gone: float) -> None:
        if self._bar is None:
            self._bar = tqdm(
                total=round(self._limit_s),
                bar_format="{l_bar}{bar:20}| {n_fmt} of {total_fmt} s",
                leave=False,
                disable=None,  # no bar unless stderr is a terminal
            )
        self._bar.set_description_str(what, refresh=False)
        self._bar.n = min(round(gone), self._bar.total)
        self._bar.refresh()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
