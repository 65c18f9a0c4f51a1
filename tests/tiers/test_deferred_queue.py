"""The file in which requests wait, its bounds, and the lock of the one process that works on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_runtime.deferred.answers import pack, unpack
from edge_runtime.deferred.queue import Queue
from edge_runtime.errors import InvalidRequest, QueueFull, StorageError
from edge_runtime.locks import HeldLock
from edge_runtime.policy.rules import Deferred
from edge_runtime.prompts import About, Messages, Text, TierRequest
from edge_runtime.sampling import SamplingParams


def test_what_was_asked_comes_back_as_it_was() -> None:
    params = SamplingParams(temperature=0.5, stop=("a",), logit_bias={5: 1.5}, n=2, seed=7)
    about = About({"x-task": "y"}, {"a": "b"}, {"service_tier": "flex"}, {"tools": [{"type": "function"}]})
    request = TierRequest(Messages([{"role": "user", "content": "ä"}]), params, about)
    assert unpack(pack(request)) == request
    with pytest.raises(InvalidRequest, match="only chats"):
        pack(TierRequest(Text("x"), params))
    for content in ("\ud800", object()):
        with pytest.raises(InvalidRequest, match="JSON"):
            pack(TierRequest(Messages([{"role": "user", "content": content}]), params))


def test_oldest_first_each_once(tmp_path: Path) -> None:
    queue = Queue(tmp_path / "queue.sqlite")
    names = [queue.add(b"%d" % number, Deferred()) for number in range(3)]
    taken = [queue.take(Deferred()) for _ in range(4)]
    assert [entry.id for entry in taken if entry] == names
    assert taken[3] is None
    queue.finish(names[0], "done", b"1")
    queue.put_back()
    assert [each.state for each in queue.entries()] == ["done", "queued", "queued"]
    queue.close()


def test_bounds_of_count_and_bytes(tmp_path: Path) -> None:
    queue = Queue(tmp_path / "queue.sqlite")
    for _ in range(2):
        queue.add(b"x" * 10, Deferred(max_count=2))
    with pytest.raises(QueueFull, match="2 deferred requests are waiting"):
        queue.add(b"x", Deferred(max_count=2))
    with pytest.raises(QueueFull, match="with 10 more they would pass the limit of 25"):
        queue.add(b"x" * 10, Deferred(max_bytes=25))
    queue.add(b"x" * 5, Deferred(max_bytes=25))
    queue.close()


def test_bounds_of_age(tmp_path: Path) -> None:
    now = [1000.0]
    queue = Queue(tmp_path / "queue.sqlite", clock=lambda: now[0], uptime=lambda: now[0])
    bounds = Deferred(max_age_hours=1)
    old = queue.add(b"x", bounds)
    now[0] += 3601
    assert queue.take(bounds) is None
    entry = queue.get(old)
    assert entry is not None
    assert entry.state == "failed"
    assert b"too old" in (entry.result or b"")
    now[0] += 3601
    assert queue.take(bounds) is None
    assert queue.get(old) is None
    queue.close()


def test_a_clock_that_jumps_back_delays_nothing(tmp_path: Path) -> None:
    now = [1_000_000.0]
    queue = Queue(tmp_path / "queue.sqlite", clock=lambda: now[0])
    first = queue.add(b"x", Deferred())
    now[0] = 5.0
    entry = queue.take(Deferred())
    assert entry is not None
    queue.wait(first, "later", 0)
    second = queue.add(b"y", Deferred())
    assert [queue.take(Deferred()), queue.take(Deferred())] != [None, None]
    assert {each.id for each in queue.entries() if each.state == "running"} == {first, second}
    queue.close()


def test_a_file_that_is_no_queue_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "queue.sqlite").write_bytes(b"no database at all, but a text that is long enough" * 20)
    with pytest.raises(StorageError, match="cannot be used"):
        Queue(tmp_path / "queue.sqlite")


def test_one_process_works_and_another_takes_over(tmp_path: Path) -> None:
    first, second = HeldLock(tmp_path / "lock"), HeldLock(tmp_path / "lock")
    assert first.try_acquire()
    assert first.try_acquire()
    assert not second.try_acquire()
    first.release()
    assert second.try_acquire()
    second.release()


def test_a_lock_that_was_given_back_is_not_taken_any_more(tmp_path: Path) -> None:
    """By a thread that was on its way when the worker ended."""
    first, second = HeldLock(tmp_path / "lock"), HeldLock(tmp_path / "lock")
    first.release()
    assert not first.try_acquire()
    assert second.try_acquire()
    second.release()
    assert not (tmp_path / "lock").exists()
