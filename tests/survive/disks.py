"""Full and read-only disks: ``python -m tests.survive.disks [--points 12] [--only pull,ledger] [--seed 0] [--json]``.

As :mod:`tests.survive.kills`, but from a call on there is no room, or nothing can be changed; and on real disks of a
few hundred kilobytes, where this user may mount some. A command then ends with one line that names a path and says what
helps, or, if it can do without, says so and goes on; what was there is as it was. Once there is room the same command
ends as if nothing had been. ``answer`` only reads: it must answer on a read-only disk.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from tests.survive import workers
from tests.survive.activities import ACTIVITIES, Activity, Fixture, edge_glm, hold
from tests.survive.faulty_disk import Box, Ended, Fault, Mode
from tests.survive.kills import Bench, Reference, Result, arguments, failure, table

MODES = (Mode.FULL, Mode.NO_DATA, Mode.READ_ONLY, Mode.GLITCH)
HELPS = ("free some space", "read-only")
"""What an error must say of what can be done."""
_ERROR = re.compile(r"^edge-glm: (.*)$", re.MULTILINE)


def told(ended: Ended, box: Box) -> None:
    """It ended by itself, with one line. Broken."""
    lines = _ERROR.findall(ended.stderr)
    wrong = ended.stderr[-1500:]
    hold(ended.code == 1, f"it ended with {ended.code}: {wrong}")
    hold(len(lines) == 1, f"not one line says why: {wrong}")
    hold("internal error" not in lines[0] and "Traceback" not in ended.stderr, f"no clear error: {wrong}")
    hold(str(box.root) in lines[0] or "out.jsonl" in lines[0], f"an error that names no path: {lines[0]}")
    hold(any(each in lines[0] for each in HELPS), f"an error that does not say what helps: {lines[0]}")


def hold_up(bench: Bench, reference: Reference, box: Box, ended: Ended) -> None:
    """After the fault. Broken."""
    activity = reference.activity
    activity.check(box, bench.fixture, ended.stdout)
    if ended.code:
        told(ended, box)
    elif activity.needs_disk:
        whole = activity.whole(box, ended.stdout)
        hold(whole == reference.whole, f"it ended well and did not do its work: {ended.stderr[-500:]}")


def strike(bench: Bench, reference: Reference, number: int, fault: Fault) -> str | None:
    """What is wrong after ``fault``."""
    activity = reference.activity
    box = bench.box(f"{activity.name}-{number}", activity)
    try:
        hold_up(bench, reference, box, bench.launcher.run(activity.command, box, fault))
        reference.hold_resumed(bench.launcher, box, bench.fixture)
    except Exception as error:
        return failure(fault, error)
    finally:
        shutil.rmtree(box.root)
    return None


def faults(calls: int, count: int, chance: random.Random) -> list[Fault]:
    """Spread over all calls, each mode in turn, the read-only one from the first call on too."""
    made = [Fault(Mode.READ_ONLY, 1)]
    for index in range(count - 1):
        low, high = calls * index // (count - 1), calls * (index + 1) // (count - 1)
        made.append(Fault(MODES[index % len(MODES)], chance.randint(low + 1, max(high, low + 1))))
    return made


# --- real disks -------------------------------------------------------------------------------------------------------


def may_mount(folder: Path) -> bool:
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)], capture_output=True)
    if done.returncode == 0:
        subprocess.run(["umount", str(folder)], check=True)
    return done.returncode == 0


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Callable[[str], None]]:
    """A disk of that size at ``folder``; call what is given with further options of mount."""
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "none", str(folder), "-o"]

    def remount(options: str) -> None:
        subprocess.run([*mount, f"remount,{options}"], check=True)

    subprocess.run([*mount, f"size={kilobytes}k"], check=True)
    try:
        yield remount
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def on_small_disk(bench: Bench, reference: Reference, number: int, share: float) -> str | None:
    """On one that has ``share`` of the room that an undisturbed run needs beside what is there; 0: read-only."""
    activity = reference.activity
    place = bench.folder / f"{activity.name}-disk-{number}"
    what = f"a disk with {share:.0%} of the room" if share else "a read-only disk"
    try:
        with small_disk(place, 1 << 20) as remount:
            box = bench.box(place.name, activity)
            before = _kilobytes(place)
            if share:
                remount(f"size={before + max(int(reference.kilobytes * share), 4)}k")
            else:
                remount("ro")
            ended = bench.launcher.run(activity.command, box)
            remount(f"rw,size={1 << 20}k")
            hold_up(bench, reference, box, ended)
            reference.hold_resumed(bench.launcher, box, bench.fixture)
    except Exception as error:
        return failure(what, error)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return None


def _kilobytes(disk: Path) -> int:
    """That are taken on it."""
    found = os.statvfs(disk)
    return (found.f_blocks - found.f_bfree) * found.f_frsize // 1024


def room_needed(bench: Bench, reference: Reference) -> Reference:
    """Finds it out by running it once on a large disk."""
    place = bench.folder / f"{reference.activity.name}-room"
    with small_disk(place, 1 << 20):
        box = bench.box(place.name, reference.activity)
        before = _kilobytes(place)
        bench.launcher.run(reference.activity.command, box)
        return reference.needing(max(_kilobytes(place) - before, 8))


# --- reading ----------------------------------------------------------------------------------------------------------


def _with_policy(box: Box, fixture: Fixture) -> None:
    ACTIVITIES["prefixes"].prepare(box, fixture)
    (box.work / "policy.toml").write_text('[[tiers]]\nname = "local"\nkind = "local"\n', encoding="utf-8")


_LONG = workers.PROMPTS[0]
"""Its prefix would be kept."""
_READING = tuple(
    Activity(
        "answer",
        edge_glm("run", "model", _LONG, "--max-tokens", "8", "--temperature", "0", "--device", "edge:cpu", *more),
        _with_policy,
        lambda box, fixture, said: None,
        lambda box, said: said,
    )
    for more in ((), ("--policy", "policy.toml"))
)


def answers(bench: Bench) -> Result:
    """By itself, and by a policy: on a disk that does nothing from the first call on as on one that does."""
    result = Result("answer", 0, 0)
    for activity in _READING:
        reference = bench.reference(activity)
        result.calls, result.seconds = reference.ended.calls, reference.ended.seconds
        for mode in MODES:
            box = bench.box(f"answer-{result.points}", activity)
            ended = bench.launcher.run(activity.command, box, Fault(mode, 1))
            result.points += 1
            lines = ended.stderr.splitlines()
            try:
                hold(ended.code == 0, f"no answer: {ended.stderr}")
                hold(ended.stdout == reference.ended.stdout, f"another answer: {ended.stdout}")
                hold(len(set(lines)) == len(lines), f"something is said twice: {ended.stderr}")
                hold(mode is not Mode.READ_ONLY or "ead-only" in ended.stderr, "it is not said that nothing is kept")
            except AssertionError as error:
                result.failures.append(f"{mode.name}: {error}")
                print(f"answer: {result.failures[-1]}", file=sys.stderr)
    return result


# --- all --------------------------------------------------------------------------------------------------------------


def run_activity(bench: Bench, name: str, count: int, seed: int, jobs: int, mount: bool) -> Result:
    reference = bench.reference(ACTIVITIES[name])
    result = Result(name, reference.ended.calls, reference.ended.seconds)
    chosen = faults(reference.ended.calls, count, random.Random(f"{seed} {name}"))
    with ThreadPoolExecutor(jobs) as pool:
        found = list(pool.map(lambda each: strike(bench, reference, *each), enumerate(chosen)))
    if mount:
        reference = room_needed(bench, reference)
        shares = (0, 0.1, 0.3, 0.5, 0.7, 0.9)
        found += [on_small_disk(bench, reference, number, share) for number, share in enumerate(shares)]
    result.points = len(found)
    result.failures = [each for each in found if each is not None]
    for wrong in result.failures:
        print(f"{name}: {wrong}", file=sys.stderr)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    given = arguments(argv, "disks", __doc__, 12, "of each activity, beside six real disks")
    with tempfile.TemporaryDirectory(prefix="edge-glm-disks-") as folder:
        bench = Bench(Path(folder))
        mount = may_mount(Path(folder) / "mount")
        results = [run_activity(bench, name, given.points, given.seed, given.jobs, mount) for name in given.only]
        results.append(answers(bench))
    if given.json:
        print(json.dumps({"seed": given.seed, "mounted": mount, "activities": [vars(each) for each in results]}))
    else:
        print(table(results))
        print(f"seed {given.seed}; " + ("and on real disks" if mount else "no real disks: mounting is not allowed"))
    return int(any(each.failures for each in results))


if __name__ == "__main__":
    sys.exit(main())
