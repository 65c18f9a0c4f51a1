"""A run over one surface: cases made, run, counted; what fails made small and kept."""

from __future__ import annotations

import os
import random
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.fuzz.surface import Case, Surface, Verdict
from tests.fuzz.watched import Watched

_CHUNK = 32
"""Cases that a child is sent at once, of a surface that runs them one after the other."""
_SMALLER_SECONDS = 10.0
"""To make a failing input smaller."""
_KEPT = 40
"""Different failures that are kept; after these a surface is given up."""


@dataclass
class Finding:
    """A failure, once for all cases that fail alike."""

    detail: str
    file: Path
    """The input, made small."""
    times: int = 1


@dataclass
class Result:
    """Of a surface."""

    surface: str
    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    findings: dict[str, Finding] = field(default_factory=dict)
    worst_seconds: float = 0.0
    growth: int = 0
    """Bytes of resident memory at the peak, over what the valid inputs took."""
    seconds: float = 0.0

    @property
    def failures(self) -> int:
        return sum(each.times for each in self.findings.values())


def run(kind: type[Surface], count: int, seed: int, keep: Path, until: float | None = None) -> Result:
    """``count`` cases, the same for the same ``seed``, then the valid ones again. ``keep``: a folder for failing
    inputs. ``until``: of ``time.monotonic``, when no more are begun."""
    result, start = Result(kind.name), time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f"edge-glm-fuzz-{kind.name}-", dir=_place()) as folder:
        ours = Path(folder) / "ours"
        ours.mkdir()
        surface = kind(ours, seed)
        valid = surface.prepare()
        theirs = Path(folder) / "theirs"
        theirs.mkdir()
        with Watched(kind, theirs, seed) as watched:
            for cases in _batches(surface, count, seed):
                if (until is not None and time.monotonic() > until) or len(result.findings) >= _KEPT:
                    break
                for case, verdict in zip(cases, watched.run(cases), strict=True):
                    _count(result, case, verdict, watched, keep)
            for case, verdict in zip(valid, watched.run(valid), strict=True):
                if verdict.kind != "accepted":
                    _fail(result, case, f"a valid input at the end is {verdict.kind}: {verdict.detail}", keep)
        result.growth = watched.growth
    result.seconds = time.monotonic() - start
    return result


def _place() -> str | None:
    """In memory where that is possible: packages are flushed to the disk, which is not what is tested."""
    memory = Path("/dev/shm")
    return str(memory) if os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 2**28 else None


def _batches(surface: Surface, count: int, seed: int) -> Iterator[list[Case]]:
    size = max(surface.batch, _CHUNK)
    for start in range(0, count, size):
        yield [
            surface.make(random.Random(f"{surface.name} {seed} {number}"))
            for number in range(start, min(start + size, count))
        ]


def _count(result: Result, case: Case, verdict: Verdict, watched: Watched, keep: Path) -> None:
    result.inputs += 1
    result.worst_seconds = max(result.worst_seconds, verdict.seconds)
    if verdict.kind == "accepted":
        result.accepted += 1
    elif verdict.kind == "refused":
        result.refused += 1
    elif (key := _alike(verdict.detail)) in result.findings:
        result.findings[key].times += 1
    else:
        _fail(result, smaller(case, verdict, watched), verdict.detail, keep)


def _fail(result: Result, case: Case, detail: str, keep: Path) -> None:
    file = keep / result.surface / f"{len(result.findings)}-{case.name}"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(case.data)
    result.findings[_alike(detail)] = Finding(detail, file)


def _alike(detail: str) -> str:
    """The same for two failures that are probably one: what kind and where, without what was read."""
    return re.sub(r"\d{3,}|'[^']*'|\"[^\"]*\"", "…", detail.split(": ")[0] if " at " in detail else detail)[:120]


def smaller(case: Case, verdict: Verdict, watched: Watched) -> Case:
    """Pieces are left out as long as it fails alike (Zeller's ddmin, in its simplest form)."""
    if verdict.seconds >= 1:  # of what takes long there would be no end
        return case
    data, size, until = case.data, max(len(case.data) // 2, 1), time.monotonic() + _SMALLER_SECONDS
    while size and time.monotonic() < until:
        for start in range(0, len(data), size):
            shorter = Case(case.name, data[:start] + data[start + size :])
            (found,) = watched.run([shorter])
            if found.kind == "failed" and _alike(found.detail) == _alike(verdict.detail):
                data = shorter.data
                break
            if time.monotonic() > until:
                break
        else:
            size //= 2
    return Case(case.name, data)


def replay(kind: type[Surface], file: Path, seed: int) -> Verdict:
    """Of an input that was kept."""
    folder = Path(tempfile.mkdtemp(prefix="edge-glm-fuzz-"))
    try:
        with Watched(kind, folder, seed) as watched:
            (verdict,) = watched.run([Case(file.name.partition("-")[2], file.read_bytes())])
            return verdict
    finally:
        shutil.rmtree(folder)
