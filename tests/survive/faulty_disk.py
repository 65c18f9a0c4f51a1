"""Commands that are killed, or whose disk fails, at a given call: see ``faulty_disk.c``, which is compiled here.

Counting calls finds the torn states that points in time hardly ever meet, and finds them again.
"""

from __future__ import annotations

import enum
import hashlib
import os
import signal
import struct
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
_SOURCE = Path(__file__).with_name("faulty_disk.c")
_STATE = struct.Struct("=QQQ")
"""Calls so far, the first that fails, the mode."""
_ENGINE = ".cache"
"""In the user's folder, where ONNX Runtime writes a number of the device, once; what becomes of it is not ours."""
LONGEST_S = 60.0
"""Of any command here; one that hangs is a failure."""


class Mode(enum.IntEnum):
    """As in ``faulty_disk.c``."""

    COUNT = 0
    KILL = 1
    TORN = 2
    FULL = 3
    NO_DATA = 4
    READ_ONLY = 5
    GLITCH = 6


class Fault(NamedTuple):
    mode: Mode
    at: int
    """The first call that fails, from 1."""

    def __str__(self) -> str:
        return f"{self.mode.name.lower().replace('_', '-')} at call {self.at}"


class Kill(NamedTuple):
    seconds: float
    """After the start."""
    leader: bool = False
    """Only the first process, as the kernel does when memory is short; its children must end by themselves."""

    def __str__(self) -> str:
        return f"kill{' of the first process' if self.leader else ''} after {self.seconds:.3f} s"


class Ended(NamedTuple):
    code: int
    """Negative: the signal."""
    stdout: str
    stderr: str
    calls: int
    """That changed, or would have changed, files of the box."""
    seconds: float


@dataclass(frozen=True)
class Box:
    """The disk of one machine: all that a command may write lies under ``root``."""

    root: Path

    @property
    def home(self) -> Path:
        """EDGE_GLM_HOME."""
        return self.root / "home"

    @property
    def work(self) -> Path:
        """Where commands run."""
        return self.root / "work"

    @property
    def tmp(self) -> Path:
        """TMPDIR."""
        return self.root / "tmp"

    def make(self) -> None:
        for folder in (self.home, self.work, self.tmp):
            folder.mkdir(parents=True, exist_ok=True)

    def files(self) -> set[str]:
        """Everything in it, by relative path. What is named by where the box's model lies is not named by that."""
        key = hashlib.sha256(str(self.work / "model").encode()).hexdigest()
        paths = (path.relative_to(self.root).as_posix().replace(key, "MODEL") for path in self.root.rglob("*"))
        return {path for path in paths if not path.startswith(_ENGINE)}


class Launcher:
    """Runs commands in boxes. ``folder`` holds what must outlive a box's disk; ``wheels`` is the only package index."""

    def __init__(self, folder: Path, wheels: Path) -> None:
        """OSError, CalledProcessError where there is no C compiler."""
        self._folder = folder
        self._wheels = wheels
        self._library = folder / "faulty_disk.so"
        compiler = ["cc", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror"]
        subprocess.run([*compiler, "-o", str(self._library), str(_SOURCE), "-ldl"], check=True)

    def run(self, command: Sequence[str], box: Box, trouble: Fault | Kill | None = None) -> Ended:
        """To the end, or to ``trouble``'s; nothing that it started runs any more.

        TimeoutError if it, or a child of it, does not end."""
        key = f"{box.root.name}-{time.monotonic_ns()}"
        state, out, err = (self._folder / f"{key}.{suffix}" for suffix in ("state", "out", "err"))
        fault = trouble if isinstance(trouble, Fault) else Fault(Mode.COUNT, 0)
        state.write_bytes(_STATE.pack(0, fault.at, fault.mode))
        try:
            started = time.monotonic()
            with out.open("wb") as stdout, err.open("wb") as stderr:
                process = subprocess.Popen(
                    command,
                    cwd=box.work,
                    env=self._environment(box, state),
                    stdin=subprocess.DEVNULL,
                    stdout=stdout,
                    stderr=stderr,
                    start_new_session=True,
                )
            code = _wait(process, trouble if isinstance(trouble, Kill) else None)
            seconds = time.monotonic() - started
            calls = _STATE.unpack(state.read_bytes())[0]
            return Ended(code, _text(out), _text(err), calls, seconds)
        finally:
            for path in (state, out, err):
                path.unlink(missing_ok=True)

    def _environment(self, box: Box, state: Path) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("EDGE_GLM_", "PIP_", "XDG_"))}
        return kept | {
            "PYTHONPATH": str(ROOT),
            "EDGE_GLM_HOME": str(box.home),
            "HOME": str(box.root),
            "TMPDIR": str(box.tmp),
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(self._wheels),
            "LD_PRELOAD": str(self._library),
            "FAULTY_ROOT": str(box.root.resolve()),
            "FAULTY_STATE": str(state),
        }


def _wait(process: subprocess.Popen[bytes], kill: Kill | None) -> int:
    try:
        if kill is not None:
            with suppress(subprocess.TimeoutExpired):
                return process.wait(kill.seconds)
            with suppress(ProcessLookupError):
                (os.kill if kill.leader else os.killpg)(process.pid, signal.SIGKILL)
        try:
            code = process.wait(LONGEST_S)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"{' '.join(map(str, process.args))} did not end") from error  # type: ignore[arg-type]
        _wait_for_children(process.pid)
        return code
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_for_children(group: int) -> None:
    """Until nobody of the process group lives."""
    until = time.monotonic() + LONGEST_S / 2
    while time.monotonic() < until:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)
    raise TimeoutError("a child outlives the process that started it")


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")
