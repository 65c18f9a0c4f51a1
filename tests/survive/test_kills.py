"""A small share of ``tests.survive.kills`` and ``tests.survive.disks``: of each activity two points, and one disk."""

from __future__ import annotations

import random
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.survive import disks
from tests.survive.activities import ACTIVITIES
from tests.survive.faulty_disk import Fault, Mode
from tests.survive.kills import Bench, points, strike

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the library that counts calls is for Linux"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="it is compiled here"),
]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    return Bench(tmp_path_factory.mktemp("survive"))


@pytest.mark.parametrize("name", ACTIVITIES)
def test_it_goes_on_after_a_kill_and_after_a_full_disk(bench: Bench, name: str) -> None:
    reference = bench.reference(ACTIVITIES[name])
    chance = random.Random(name)
    at_call, in_time = points(reference, 2, chance)
    fault = Fault(chance.choice(disks.MODES), chance.randint(1, reference.ended.calls))
    with ThreadPoolExecutor() as pool:
        killed = [pool.submit(strike, bench, reference, *each) for each in enumerate((at_call, in_time))]
        full = pool.submit(disks.strike, bench, reference, len(killed), fault)
    assert [each.result()[1] for each in killed] == [None, None]
    assert full.result() is None


def test_a_model_that_is_only_read_answers_on_any_disk(bench: Bench) -> None:
    assert disks.answers(bench).failures == []


def test_what_is_not_whole_is_noticed(bench: Bench) -> None:
    """The checks themselves: rows that went missing, a half line, files that were left."""
    reference = bench.reference(ACTIVITIES["batch"])
    box = bench.box("noticed", reference.activity)
    (box.tmp / "left").touch()
    with pytest.raises(AssertionError, match="left behind: tmp/left"):
        reference.hold_resumed(bench.launcher, box, bench.fixture)
    answers = (box.work / "out.jsonl").read_bytes().splitlines(keepends=True)
    (box.work / "out.jsonl").write_bytes(b"".join(answers[1:]))
    with pytest.raises(AssertionError, match="not one line for each request"):
        reference.activity.check(box, bench.fixture, "")


def test_calls_are_counted_alike(bench: Bench) -> None:
    """So that a point is met again."""
    one, other = (bench.reference(ACTIVITIES["export"]).ended.calls for _ in range(2))
    assert one == other > 100
    box = bench.box("killed", ACTIVITIES["export"])
    ended = bench.launcher.run(ACTIVITIES["export"].command, box, Fault(Mode.KILL, 50))
    assert (ended.code, ended.calls) == (-9, 50)
