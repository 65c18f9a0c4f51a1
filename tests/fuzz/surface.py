"""What is fuzzed, and what may come of an input: a result, or a refusal in plain words."""

from __future__ import annotations

import contextlib
import io
import random
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from devices.errors import LONGEST, EdgeError
from edge_runtime.cli.main import main as command_line
from tests.fuzz.made import pool
from tests.fuzz.mutation import Made


class Case(NamedTuple):
    """An input. ``name`` says what it is to be taken as, mostly a file's name."""

    name: str
    data: bytes


@dataclass(frozen=True)
class Verdict:
    """What came of a case."""

    kind: Literal["accepted", "refused", "failed"]
    detail: str = ""
    """The message of a refusal; of a failure what it is and where, the same for the same bug."""
    seconds: float = 0.0


class Failure(Exception):
    """The thing under test did what it must not."""


class Surface(ABC):
    """One way in. It is made twice: where cases are made, and in the child process that runs them.

    ``folder`` is an empty one for files, the same for both; ``seed`` is that of the whole run.
    """

    name: str
    weight: int
    """Its share of all inputs."""
    batch = 1
    """Cases that are run at once."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self._seed = seed

    @abstractmethod
    def prepare(self) -> list[Case]:
        """Write into the folder what all cases need, and give valid cases."""

    @abstractmethod
    def make(self, rng: random.Random) -> Case:
        """A malformed case; of what ``rng`` gives alone."""

    def made(self, rng: random.Random) -> Made:
        """A source of structures that were never valid."""
        return lambda: deepcopy(rng.choice(pool(self._seed)))

    def open(self) -> None:  # noqa: B027 - most need nothing
        """In the child, before the first case."""

    def close(self) -> None:  # noqa: B027
        """In the child, after the last case."""

    @abstractmethod
    def run(self, case: Case) -> object:
        """Through the door that users have. Returns what came of it; raises EdgeError for a refusal; anything else
        that it raises is a failure."""

    def run_all(self, cases: Sequence[Case]) -> Iterator[tuple[int, Verdict]]:
        """Verdicts as they come, by the place of their case."""
        for place, case in enumerate(cases):
            yield place, judged(self, case)


def judged(surface: Surface, case: Case) -> Verdict:
    """Runs the case."""
    start = time.perf_counter()
    verdict = _judged(surface, case)
    return replace(verdict, seconds=time.perf_counter() - start)


def _judged(surface: Surface, case: Case) -> Verdict:
    try:
        surface.run(case)
    except EdgeError as error:
        wrong = unclear(str(error))
        return Verdict("refused", str(error)) if wrong is None else Verdict("failed", f"{wrong}, at {_where(error)}")
    except Failure as error:
        return Verdict("failed", str(error))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of a Rust library is no Exception
        return Verdict("failed", f"{type(error).__name__} at {_where(error)}: {' '.join(str(error).split())[:200]}")
    return Verdict("accepted")


def _where(error: BaseException) -> str:
    """The last line of ours that it came through."""
    frames = traceback.extract_tb(error.__traceback__)
    parts = ("/devices/", "/edge_runtime/", "/exporters/")
    ours = [frame for frame in frames if any(part in frame.filename for part in parts)] or frames
    last = ours[-1]
    return f"{'/'.join(Path(last.filename).parts[-2:])}:{last.lineno}"


def unclear(message: str) -> str | None:
    """Why a message is not for users; None: it is."""
    if not message.strip():
        return "an empty message"
    if len(message) > LONGEST:
        return f"a message of {len(message)} characters"
    if "Traceback (most recent" in message or " object at 0x" in message:
        return f"a message with Python's insides: {message[:200]!r}"
    return None


def command(*argv: str) -> int:
    """Runs ``edge-glm`` with ``argv`` in this process. Failure if its user sees an internal error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = command_line(argv)
        except SystemExit as error:  # argparse's
            code = error.code if isinstance(error.code, int) else 1
    said = err.getvalue()
    for sign in ("internal error", "Traceback"):
        if sign in said:
            line = next(line for line in said.splitlines() if sign in line)
            raise Failure(f"edge-glm {argv[0]} says: {line[:300]}")
    if code not in (0, 1, 2):
        raise Failure(f"edge-glm {argv[0]} ended with {code}: {said[:300]}")
    if code and not said.strip():
        raise Failure(f"edge-glm {argv[0]} ended with {code} and said nothing")
    if code == 1:
        wrong = unclear(said)
        if wrong is not None:
            raise Failure(f"edge-glm {argv[0]}: {wrong}")
    return code


def sometimes(case: Case, one_in: int) -> bool:
    """For what is too slow for every case: by the case itself, so that it is the same when it is run again."""
    return sum(case.data) % one_in == 0


Json = dict[str, Any]
