"""Kill −9 at random points: ``python -m tests.survive.kills [--points 200] [--only pull,ledger] [--seed 0] [--json]``.

Each activity runs once undisturbed; then again and again, each time on a disk of its own, and is killed with all its
children: at a call that changes a file (:mod:`tests.survive.faulty_disk`), half-way through a write, or at a point in
time. What is left must be whole, by the readers that everybody uses; the same command must then go on to the end, lose
nothing of what was kept, and leave what the undisturbed run left, file by file. Exits with 1 if a point did not.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.survive.activities import ACTIVITIES, Activity, Fixture, hold, make_fixture
from tests.survive.faulty_disk import Box, Ended, Fault, Kill, Launcher, Mode

_LOCKS = {"home/keys.lock", "home/deferred.lock", "home/cache/tuning.lock"}
"""Of files that the command need not change again: empty, and taken by whoever does."""


@dataclass
class Result:
    """Of an activity."""

    activity: str
    calls: int
    """Of an undisturbed run, that change files."""
    seconds: float
    """Of it."""
    points: int = 0
    killed: int = 0
    """Points at which it still ran."""
    failures: list[str] = field(default_factory=list)


class Bench:
    """Fixture, launcher and boxes in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fixture = make_fixture(folder)
        outside = folder / "outside"
        outside.mkdir()
        self.launcher = Launcher(outside, folder / "wheels")
        self._tune_once()

    def _tune_once(self) -> None:
        """The tuning log that is there before."""
        box = Box(self.folder / "tuned")
        box.make()
        shutil.copytree(self.fixture.synthetic, box.work / "model")
        ended = self.launcher.run(ACTIVITIES["tune"].command, box)
        hold(ended.code == 0, ended.stderr)
        shutil.copy(box.home / "cache" / "tuning.json", self.fixture.tuned)
        shutil.rmtree(box.root)

    def box(self, name: str, activity: Activity) -> Box:
        box = Box(self.folder / name)
        box.make()
        activity.prepare(box, self.fixture)
        return box

    def reference(self, activity: Activity) -> Reference:
        box = self.box(f"{activity.name}-reference", activity)
        ended = self.launcher.run(activity.command, box)
        hold(ended.code == 0, f"{activity.name} fails undisturbed: {ended.stderr}")
        activity.check(box, self.fixture, ended.stdout)
        whole = activity.whole(box, ended.stdout)
        try:
            return Reference(activity, ended, whole, box.files())
        finally:
            shutil.rmtree(box.root)


@dataclass(frozen=True)
class Reference:
    """An undisturbed run."""

    activity: Activity
    ended: Ended
    whole: object
    files: set[str]
    kilobytes: int = 0
    """That it needs on a disk, where that is known."""

    def needing(self, kilobytes: int) -> Reference:
        return replace(self, kilobytes=kilobytes)

    def hold_resumed(self, launcher: Launcher, box: Box, fixture: Fixture) -> None:
        """The same command, now undisturbed, ends as if nothing had been. Broken."""
        activity = self.activity
        kept = activity.records(box)
        ended = launcher.run(activity.command, box)
        hold(ended.code == 0, f"it does not go on: {ended.stderr[-2000:]}")
        activity.check(box, fixture, ended.stdout)
        records = activity.records(box)
        hold(all(each in records for each in kept), "going on has lost what was kept")
        whole = activity.whole(box, ended.stdout)
        hold(whole == self.whole, f"it ends otherwise than undisturbed: {whole!r}, not {self.whole!r}"[:2000])
        files = box.files() - _LOCKS
        left, missing = sorted(files - self.files), sorted(self.files - files)
        hold(not left, f"left behind: {', '.join(left)}")
        hold(not missing, f"missing: {', '.join(missing)}")


def points(reference: Reference, count: int, chance: random.Random) -> list[Fault | Kill]:
    """Half at calls, spread over all of them, half of these within a write; half in time."""
    calls, seconds = reference.ended.calls, reference.ended.seconds
    at_calls = count - count // 2
    made: list[Fault | Kill] = []
    for index in range(at_calls):
        low, high = calls * index // at_calls, calls * (index + 1) // at_calls
        mode = Mode.TORN if chance.random() < 0.5 else Mode.KILL
        made.append(Fault(mode, chance.randint(low + 1, max(high, low + 1))))
    made += [Kill(chance.uniform(0, seconds), leader=chance.random() < 0.5) for _ in range(count // 2)]
    return made


def strike(bench: Bench, reference: Reference, number: int, trouble: Fault | Kill) -> tuple[bool, str | None]:
    """Whether it was killed in time, and what is wrong after."""
    activity = reference.activity
    box = bench.box(f"{activity.name}-{number}", activity)
    try:
        ended = bench.launcher.run(activity.command, box, trouble)
        activity.check(box, bench.fixture, ended.stdout)
        reference.hold_resumed(bench.launcher, box, bench.fixture)
    except Exception as error:
        return True, failure(trouble, error)
    finally:
        shutil.rmtree(box.root)
    return ended.code < 0, None


def run_activity(bench: Bench, name: str, count: int, seed: int, jobs: int) -> Result:
    reference = bench.reference(ACTIVITIES[name])
    result = Result(name, reference.ended.calls, reference.ended.seconds)
    troubles = points(reference, count, random.Random(f"{seed} {name}"))
    with ThreadPoolExecutor(jobs) as pool:
        for killed, wrong in pool.map(lambda each: strike(bench, reference, *each), enumerate(troubles)):
            result.points += 1
            result.killed += killed
            if wrong is not None:
                result.failures.append(wrong)
                print(f"{name}: {wrong}", file=sys.stderr)
    return result


def shares(points: int, parts: int) -> list[int]:
    return [points // parts + (index < points % parts) for index in range(parts)]


def table(results: Sequence[Result]) -> str:
    head = f"{'activity':10}{'calls':>7}{'seconds':>9}{'points':>8}{'killed':>8}{'failures':>10}"
    lines = [
        f"{each.activity:10}{each.calls:7}{each.seconds:9.2f}{each.points:8}{each.killed:8}{len(each.failures):10}"
        for each in results
    ]
    return "\n".join([head, *lines])


def failure(trouble: object, error: Exception) -> str:
    """In words, with where it came from unless a check says it all."""
    return f"{trouble}: {error}" + ("" if isinstance(error, AssertionError) else f"\n{traceback.format_exc()}")


def arguments(
    argv: Sequence[str] | None, name: str, description: str | None, points: int, about: str
) -> argparse.Namespace:
    """Of the command ``name``. ``only``: a list of activities."""
    parser = argparse.ArgumentParser(prog=f"python -m tests.survive.{name}", description=description)
    parser.add_argument("--points", type=int, default=points, help=f"{about} ({points})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", metavar="NAMES", type=_names, default=[*ACTIVITIES], help=f"of {','.join(ACTIVITIES)}"
    )
    parser.add_argument("--jobs", type=int, default=2, help="points at once (2)")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(argv)


def _names(given: str) -> list[str]:
    chosen = given.split(",")
    unknown = [each for each in chosen if each not in ACTIVITIES]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"no activity is called {', '.join(unknown)}; there are {', '.join(ACTIVITIES)}"
        )
    return chosen


def main(argv: Sequence[str] | None = None) -> int:
    given = arguments(argv, "kills", __doc__, 200, "shared by the activities")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="edge-glm-kills-") as folder:
        bench = Bench(Path(folder))
        results = [
            run_activity(bench, name, count, given.seed, given.jobs)
            for name, count in zip(given.only, shares(given.points, len(given.only)), strict=True)
        ]
    if given.json:
        print(json.dumps({"seed": given.seed, "activities": [vars(each) for each in results]}, indent=2))
    else:
        print(table(results))
        print(f"seed {given.seed}, {time.monotonic() - began:.0f} s")
    return int(any(each.failures for each in results))


if __name__ == "__main__":
    sys.exit(main())
