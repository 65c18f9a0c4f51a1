"""Rung by rung, each in a process of its own, so that its peak memory is its own."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

import msgspec

from edge_runtime.bench.ladder.baseline import Graph
from edge_runtime.bench.ladder.job import Agreement, Answered, Climb, Ladder, Measured, Rung, Step, What
from edge_runtime.bench.ladder.worker import Answer, Order
from edge_runtime.bench.machine import this_machine
from edge_runtime.bench.measure import now
from edge_runtime.bench.process import ask
from edge_runtime.errors import ConfigError, EdgeError
from edge_runtime.package import Weights, storage_errors
from edge_runtime.paths import home
from edge_runtime.scratch import scratch_folder

WORKER = "edge_runtime.bench.ladder.worker"
Say = Callable[[str], None]
_DOING: dict[What, str] = {"prepare": "preparing", "measure": "measuring", "agree": "comparing answers of"}


def climb(job: Climb, say: Say = lambda words: None) -> Ladder:
    """``say`` hears what is done next. ConfigError if no device could be climbed; StorageError."""
    machine = this_machine()  # now, while the load is that of others
    steps: dict[str, list[Step]] = {}
    problems: dict[str, str] = {}
    cache = home().cache
    with storage_errors(f"cannot write the unfused graph in {cache}"):
        cache.mkdir(parents=True, exist_ok=True)
        with scratch_folder("ladder-", cache) as folder:
            climber = _Climber(job, str(folder), say)
            for device in job.devices:
                try:
                    steps[device] = climber.climb(device)
                except EdgeError as error:
                    problems[device] = str(error)
    if not steps:
        reasons = dict.fromkeys(problems.values())  # of a wrong reference it is the same for all
        raise ConfigError("; ".join(f"{_devices(problems, why)}: {why}" for why in reasons))
    return Ladder(created=now(), climb=job, steps=steps, problems=problems, machine=machine)


def _devices(problems: Mapping[str, str], why: str) -> str:
    return ", ".join(device for device, each in problems.items() if each == why)


class _Climber:
    """``folder`` gets the unfused graph, once for all devices."""

    def __init__(self, job: Climb, folder: str, say: Say) -> None:
        self._job = job
        self._folder = folder
        self._say = say
        self._graph: Graph | None = None

    def climb(self, device: str) -> list[Step]:
        rungs = self._job.rungs(device)
        for rung in rungs:  # all before any is measured: what cannot be prepared is told in the first minute
            if not rung.unfused or self._graph is None:
                self._graph = self._order("prepare", rung).graph or self._graph
        measured = [self._measure(rung) for rung in rungs]
        agreements: dict[Weights, Agreement] = {}
        for rung in rungs[1:]:
            if rung.weights not in agreements:  # how prompts are cut and what is kept changes no logits
                found = self._order("agree", rung).agreement
                assert found is not None
                agreements[rung.weights] = found
        first = measured[0].rounds
        return [
            _step(rung, each, first, Agreement(1.0, 0.0) if rung.unfused else agreements[rung.weights])
            for rung, each in zip(rungs, measured, strict=True)
        ]

    def _measure(self, rung: Rung) -> Measured:
        found = self._order("measure", rung).measured
        assert found is not None
        return found

    def _order(self, what: What, rung: Rung) -> Answer:
        self._say(f"{rung.device}: {_DOING[what]} {rung.name}")
        order = Order(what, self._job, rung, self._folder, self._graph)
        answer = msgspec.json.decode(ask(WORKER, msgspec.json.encode(order)), type=Answer)
        if answer.error is not None:
            raise EdgeError(f"{rung.name}: {answer.error}")
        return answer


def _step(rung: Rung, found: Measured, first: list[list[Answered]], agreement: Agreement) -> Step:
    seconds, ttft = (
        statistics.median(statistics.mean(of(each) for each in one) for one in found.rounds) for of in (_last, _first)
    )
    tokens = len(found.rounds[0][0].tokens)
    pairs = [
        (ours.tokens, theirs.tokens)
        for one, other in zip(found.rounds, first, strict=True)
        for ours, theirs in zip(one, other, strict=True)
    ]
    return Step(
        rung=rung,
        seconds=seconds,
        ttft_ms=ttft * 1e3,
        tpot_ms=(seconds - ttft) / (tokens - 1) * 1e3,
        peak_rss_bytes=found.peak_rss_bytes,
        top1=agreement.top1,
        kl=agreement.kl,
        same=statistics.mean(_same(ours, theirs) for ours, theirs in pairs),
    )


def _first(answer: Answered) -> float:
    return answer.first_s


def _last(answer: Answered) -> float:
    return answer.last_s


def _same(ours: list[int], theirs: list[int]) -> float:
    """Share of the tokens before the first that differs."""
    count = min(len(ours), len(theirs))
    return next((place for place in range(count) if ours[place] != theirs[place]), count) / count
