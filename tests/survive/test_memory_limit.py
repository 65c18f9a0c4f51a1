"""A control group whose memory limit shrinks under an open model, and grows again."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from devices import host
from devices.discovery import Device
from edge_runtime.budgets import resolve
from edge_runtime.engine import Engine
from edge_runtime.errors import OutOfKVCache
from edge_runtime.exporting import export_package
from edge_runtime.heartbeat import Heartbeat
from edge_runtime.llm import EdgeLLM
from edge_runtime.memory import BudgetSize
from edge_runtime.memory_watch import BEATS, USABLE, MemoryWatch
from edge_runtime.sampling import SamplingParams
from tests.fake_decoder import FakeDecoder
from tests.runtime.helpers import GREEDY, Gate, collect, greedy, prompt, serving, settle
from tests.server.served import wait_until

MIB = 2**20
LONG = SamplingParams(temperature=0, max_tokens=100)


class Group:
    """A control group, version 2, in files of its own."""

    def __init__(self, folder: Path) -> None:
        self.here = folder / "groups" / "service"
        self.here.mkdir(parents=True)
        (folder / "cgroup").write_text("0::/service\n")
        (self.here / "memory.stat").write_text("anon 5\ninactive_file 0\n")
        self.set(1000 * MIB, 100 * MIB)

    def set(self, limit: int, used: int) -> None:
        (self.here / "memory.max").write_text(f"{limit}\n")
        (self.here / "memory.current").write_text(f"{used}\n")


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Group:
    group = Group(tmp_path)
    monkeypatch.setattr(host, "_GROUP", tmp_path / "cgroup")
    monkeypatch.setattr(host, "_GROUPS", tmp_path / "groups")
    machine = SimpleNamespace(total=16_000 * MIB, available=12_000 * MIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
    return group


class Watched:
    """An engine under a watch that looks when it is told to."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.within: list[int | None] = []
        self.idle = True
        self.relieving = threading.Lock()
        """While it is held the relief does not end."""
        self.error: Exception | None = None
        self.watch = MemoryWatch(lambda: [engine], self._relieve, heartbeat=Heartbeat(interval=3600))

    def _relieve(self, within: int | None) -> bool:
        self.within.append(within)
        with self.relieving:
            if self.error is not None:
                raise self.error
        return self.idle

    def look(self) -> None:
        self.watch.look()
        wait_until(lambda: self.engine._limited == self.engine._kv_limits or not self.engine.idle)


@pytest.fixture
def decoder() -> FakeDecoder:
    return FakeDecoder(kv_tokens=1024, max_context=512)  # 8 bytes a token


@pytest.fixture
def watched(group: Group, decoder: FakeDecoder) -> Iterator[Watched]:
    with serving(decoder) as engine:
        made = Watched(engine)
        yield made
        made.watch.close()


def test_nothing_changes_while_nothing_does(group: Group, watched: Watched) -> None:
    for used in (100, 900, 1000):
        group.set(1000 * MIB, used * MIB)
        watched.look()
    group.set(2000 * MIB, 100 * MIB)
    watched.look()
    assert watched.engine.kv_limit is None
    assert watched.watch.told is None


def test_prefixes_give_way_where_nothing_is_left(group: Group, watched: Watched, decoder: FakeDecoder) -> None:
    engine = watched.engine
    for seed in range(4):
        collect(engine.submit(prompt(seed, 60), GREEDY))
    settle(engine)
    kept = engine.stats.cached_tokens
    assert kept > 4 * 60
    group.set(500 * MIB, 100 * MIB)  # enough is free
    watched.look()
    assert engine.stats.cached_tokens == kept
    group.set(300 * MIB, 299 * MIB)
    watched.look()
    assert engine.stats.cached_tokens == 0
    assert not decoder.sequences
    told = watched.watch.told or ""
    assert "has shrunk from 1000.0 MiB to 300.0 MiB" in told
    assert "no prefixes are kept" in told
    tokens = prompt(1, 60)
    assert collect(engine.submit(tokens, GREEDY))[0].tokens == greedy(decoder, tokens, 12)
    settle(engine)
    assert engine.stats.cached_tokens == 0
    group.set(1000 * MIB, 299 * MIB)
    watched.look()
    assert watched.watch.told is None
    collect(engine.submit(tokens, GREEDY))
    settle(engine)
    assert engine.stats.cached_tokens > 0


def test_fewer_run_at_once_and_all_are_answered(group: Group, watched: Watched, decoder: FakeDecoder) -> None:
    engine, most = watched.engine, 0
    collect(engine.submit(prompt(9, 150), GREEDY))  # so much KV cache was used when it happened

    def count(batch: object) -> None:
        nonlocal most
        most = max(most, len(engine._scheduler.running))

    settle(engine)
    used = engine.kv_bytes_used
    assert used > 150 * 8
    group.set(200 * MIB, 200 * MIB)
    watched.look()
    assert engine.kv_limit == used
    decoder.before_forward = count
    prompts = [prompt(seed, 50) for seed in range(6)]
    generations = [engine.submit(each, SamplingParams(temperature=0, max_tokens=30)) for each in prompts]
    for tokens, generation in zip(prompts, generations, strict=True):
        assert collect(generation)[0].tokens == greedy(decoder, tokens, 30)
    assert 1 <= most <= 3


def test_what_can_never_run_now_is_told_so(group: Group, watched: Watched) -> None:
    engine = watched.engine
    group.set(200 * MIB, 200 * MIB)
    watched.look()
    answer = collect(engine.submit(prompt(1, 50), GREEDY))[0]
    assert answer.last is not None
    assert isinstance(answer.last.error, OutOfKVCache)
    assert "memory has become short" in str(answer.last.error)
    group.set(1000 * MIB, 200 * MIB)
    watched.look()
    assert collect(engine.submit(prompt(1, 50), GREEDY))[0].finish_reason == "length"


def test_what_runs_makes_room_and_goes_on_later(group: Group, watched: Watched, decoder: FakeDecoder) -> None:
    engine, gate = watched.engine, Gate()
    decoder.before_forward = gate
    prompts = [prompt(seed, 20) for seed in range(3)]
    generations = [engine.submit(each, LONG) for each in prompts]
    assert gate.reached.wait(60)
    group.set(200 * MIB, 200 * MIB)
    engine.limit_kv(8 * 150, 0)  # of 3 × 120 tokens
    gate.open.set()
    for tokens, generation in zip(prompts, generations, strict=True):
        assert collect(generation)[0].tokens == greedy(decoder, tokens, 100)
    assert engine.stats.preemptions


def test_one_that_is_alone_ends_where_it_is(decoder: FakeDecoder) -> None:
    with serving(decoder) as engine:
        generation = engine.submit(prompt(1, 20), SamplingParams(temperature=0, max_tokens=400))
        assert next(iter(generation)).text
        engine.limit_kv(8 * 10)
        answer = collect(generation)[0]
        assert answer.finish_reason == "length"


def test_under_the_same_limit_there_is_never_less_than_before(group: Group, watched: Watched) -> None:
    collect(watched.engine.submit(prompt(1, 60), GREEDY))
    settle(watched.engine)
    group.set(200 * MIB, 199 * MIB)
    watched.look()
    limit = watched.engine.kv_limit
    assert limit is not None
    group.set(200 * MIB, 200 * MIB)
    watched.look()
    assert watched.engine.kv_limit == limit
    group.set(200 * MIB, 100 * MIB)
    watched.look()
    assert watched.engine.kv_limit > limit


def test_a_smaller_variant_is_taken_once_nothing_runs(group: Group, watched: Watched) -> None:
    watched.idle = False
    group.set(500 * MIB, 100 * MIB)
    for _ in range(3):
        watched.look()
        wait_until(lambda: watched.watch._relieving is None or not watched.watch._relieving.is_alive())
    watched.idle = True
    for _ in range(3):
        watched.look()
        wait_until(lambda: watched.watch._relieving is None or not watched.watch._relieving.is_alive())
    assert watched.within == [int(500 * MIB * USABLE)] * 4  # and then no more
    group.set(1000 * MIB, 100 * MIB)
    watched.look()
    wait_until(lambda: len(watched.within) == 5)
    assert watched.within[-1] is None


def test_a_limit_that_shrinks_again_meanwhile_is_made_do_with_too(group: Group, watched: Watched) -> None:
    for limit in (500, 250):
        group.set(limit * MIB, 100 * MIB)
        with watched.relieving:
            watched.watch.look()
            if limit == 500:
                wait_until(lambda: watched.within)
                group.set(250 * MIB, 100 * MIB)
                watched.watch.look()  # while the first is under way
        wait_until(lambda: watched.watch._relieving is not None and not watched.watch._relieving.is_alive())
    assert watched.within == [int(500 * MIB * USABLE), int(250 * MIB * USABLE)]


def test_what_cannot_be_made_do_with_is_tried_once(group: Group, watched: Watched) -> None:
    watched.error = RuntimeError("there is no smaller variant")
    group.set(500 * MIB, 100 * MIB)
    for _ in range(3):
        watched.look()
        wait_until(lambda: watched.watch._relieving is not None and not watched.watch._relieving.is_alive())
    assert len(watched.within) == 1


def test_a_model_whose_kv_cache_lies_elsewhere_is_told_of_the_limit_alone(group: Group) -> None:
    watch = MemoryWatch(lambda: [], lambda within: True, heartbeat=Heartbeat(interval=3600))
    group.set(500 * MIB, 100 * MIB)
    watch.look()
    assert watch.told == "the memory limit has shrunk from 1000.0 MiB to 500.0 MiB"
    watch.close()


def test_a_limit_that_is_gone_is_no_limit(group: Group, watched: Watched) -> None:
    group.set(500 * MIB, 100 * MIB)
    watched.look()
    assert watched.engine.kv_limit is not None
    (group.here / "memory.max").write_text("max\n")
    watched.look()
    assert watched.engine.kv_limit is None


def test_it_looks_by_itself(group: Group, decoder: FakeDecoder) -> None:
    with serving(decoder) as engine:
        heartbeat = Heartbeat(interval=0.01)
        watch = MemoryWatch(lambda: [engine], lambda within: True, heartbeat=heartbeat)
        group.set(500 * MIB, 100 * MIB)
        wait_until(lambda: watch.told)
        watch.close()
        assert BEATS > 0


def test_a_budget_is_never_more_than_there_is(group: Group) -> None:
    group.set(300 * MIB, 100 * MIB)
    budget = resolve(BudgetSize(2000 * MIB), Device("onnxruntime:cpu", "onnxruntime", "a processor"))
    assert budget is not None
    assert budget.nbytes == 300 * MIB


def test_a_real_model_says_so_and_goes_on(group: Group, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_GLM_HOME", str(tmp_path / "home"))
    folder = tmp_path / "small"
    export_package("synthetic:tiny", folder, ["onnxruntime"], "fp32")
    with EdgeLLM(str(folder), "onnxruntime:cpu", weights="auto") as llm:
        expected = llm.generate([5, 6, 7], GREEDY).text
        assert llm.condition.memory is None
        group.set(500 * MIB, 100 * MIB)
        llm._memory.look()
        wait_until(lambda: llm._memory._relieved == 500 * MIB)
        assert "has shrunk from 1000.0 MiB to 500.0 MiB" in str(llm.condition.memory)
        assert llm.generate([5, 6, 7], GREEDY).text == expected
        group.set(1000 * MIB, 100 * MIB)
        llm._memory.look()
        assert llm.condition.memory is None
        assert llm.ready
