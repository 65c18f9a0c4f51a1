"""Cases run in a child process under limits of time and memory, so that a crash or a hang is a finding like others."""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import re
import resource
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType

import psutil

from tests.fuzz.surface import Case, Surface, Verdict

CPU_SECONDS = 5.0
"""Of the child's CPU time that a case may take; one that waits rather than works has :data:`WALL_SECONDS`."""
WALL_SECONDS = 30.0
MORE_ADDRESSES = 3 * 2**30
"""Bytes of address space that a child may map beside what it has once it is open (RLIMIT_AS)."""
MOST_GROWTH = 256 * 2**20
"""Bytes by which a case may raise the child's peak of resident memory."""
_START_SECONDS = 120.0


@dataclass
class Memory:
    """Bytes of resident memory."""

    warm: int = 0
    """After the valid cases."""
    peak: int = 0

    @property
    def growth(self) -> int:
        return max(self.peak - self.warm, 0)


@dataclass
class Watched:
    """A surface in a child process, which is started anew after a crash or a hang."""

    kind: type[Surface]
    folder: Path
    seed: int
    growth: int = 0
    """The most by which any of the children has grown."""
    _child: _Child | None = field(default=None, init=False)

    def run(self, cases: Sequence[Case]) -> list[Verdict]:
        """Of each case. Where one of several takes the child with it, those without a verdict are run one by one."""
        found, ended = self._together(cases)
        if ended is None:
            return [verdict for verdict in found if verdict is not None]
        if len(cases) == 1:
            return [Verdict("failed", ended, WALL_SECONDS)]
        verdicts = [verdict or self.run([case])[0] for case, verdict in zip(cases, found, strict=True)]
        if all(verdict.kind != "failed" for verdict in verdicts):
            verdicts[found.index(None)] = Verdict("failed", f"{ended} (with others, not alone)", WALL_SECONDS)
        return verdicts

    def close(self) -> None:
        if self._child is not None:
            self.growth = max(self.growth, self._child.memory.growth)
            self._child.close()
            self._child = None

    def __enter__(self) -> Watched:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _together(self, cases: Sequence[Case]) -> tuple[list[Verdict | None], str | None]:
        """And how the child has ended, if it has."""
        if self._child is None:
            # what the one before has left, in the middle of a case, is none of this one's
            self._child = _Child(self.kind, Path(tempfile.mkdtemp(dir=self.folder)), self.seed)
        child = self._child
        verdicts = child.run(cases)
        self.growth = max(self.growth, child.memory.growth)
        if child.ended is not None:
            self.close()
        return verdicts, child.ended


class _Child:
    def __init__(self, kind: type[Surface], folder: Path, seed: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._log = folder.with_name(f"{folder.name}.log")
        self._process = context.Process(target=_serve, args=(kind, folder, seed, theirs, self._log), daemon=True)
        self._process.start()
        theirs.close()
        self.memory = Memory()
        self.ended: str | None = None
        """How, where it has ended by itself or had to be."""
        if not self._pipe.poll(_START_SECONDS):
            self.close()
            raise RuntimeError(f"the child for {kind.name} did not start:\n{self._said()}")
        try:
            self.memory.warm = self.memory.peak = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"the child for {kind.name} did not start:\n{self._said()}") from None

    def run(self, cases: Sequence[Case]) -> list[Verdict | None]:
        """None: it ended before."""
        verdicts: list[Verdict | None] = [None] * len(cases)
        before = self.memory.peak
        try:
            self._pipe.send(list(cases))
            for _ in cases:
                self._wait()
                if self.ended is not None:
                    return verdicts
                place, verdict, self.memory.peak = self._pipe.recv()
                verdicts[place] = verdict
        except (EOFError, ConnectionError):
            self._process.join()
            self.ended = f"the process ended with {self._process.exitcode}: {self._last_words()}"
            return verdicts
        if self.memory.peak - before > MOST_GROWTH:
            self.ended = f"memory grew by more than {MOST_GROWTH >> 20} MiB"
            return [None] * len(cases)
        return verdicts

    def close(self) -> None:
        if self.ended is None and self._process.is_alive():
            try:
                self._pipe.send(None)
                self._process.join(10)
            except OSError:  # it has ended
                pass
        self._process.kill()
        self._process.join()
        self._process.close()
        self._pipe.close()

    def _wait(self) -> None:
        """For the next verdict."""
        start, cpu = time.monotonic(), self._cpu_seconds()
        while not self._pipe.poll(0.25):
            spent, waited = self._cpu_seconds() - cpu, time.monotonic() - start
            if spent > CPU_SECONDS or waited > WALL_SECONDS:
                self.ended = f"no end after {CPU_SECONDS:g} s of work or {WALL_SECONDS:g} s of waiting"
                return

    def _cpu_seconds(self) -> float:
        try:
            times = psutil.Process(self._process.pid).cpu_times()
        except psutil.NoSuchProcess:
            return 0.0
        return float(times.user + times.system)

    def _said(self) -> str:
        return self._log.read_text(errors="replace")[-3000:] if self._log.exists() else ""

    def _last_words(self) -> str:
        """Without what differs from run to run."""
        said = self._said()
        found = re.findall(
            r"^(?:Fatal Python error: .*|thread .* panicked.*|terminate called.*|.*what\(\).*)$", said, re.M
        )
        return re.sub(r"0x[0-9a-f]+", "0x…", found[-1])[:200] if found else "no word"


# --- in the child -----------------------------------------------------------------------------------------------------


def _serve(kind: type[Surface], folder: Path, seed: int, pipe: Connection, log: Path) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.environ["EDGE_GLM_HOME"] = str(folder / "home")
    surface = kind(folder, seed)
    valid = surface.prepare()
    surface.open()
    for case in valid:
        for _, verdict in surface.run_all([case]):
            if verdict.kind != "accepted":
                raise RuntimeError(f"the valid case {case.name} was {verdict.kind}: {verdict.detail}")
    gc.collect()
    mapped = psutil.Process().memory_info().vms + MORE_ADDRESSES
    resource.setrlimit(resource.RLIMIT_AS, (mapped, mapped))
    pipe.send(peak())
    while (cases := pipe.recv()) is not None:
        for place, verdict in surface.run_all(cases):
            pipe.send((place, verdict, peak()))
    surface.close()


def peak() -> int:
    """Bytes of resident memory that this process has had at most. (``ru_maxrss`` would begin at its parent's.)"""
    found = re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024
