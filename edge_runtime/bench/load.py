"""Load on a server: requests one after another on several lines (closed loop), or as they arrive (open loop)."""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from edge_runtime.bench.client import Client, Reply, RequestFailed
from edge_runtime.bench.job import LoadJob
from edge_runtime.bench.machine import this_machine
from edge_runtime.bench.measure import now, stream_figures
from edge_runtime.bench.result import Result
from edge_runtime.bench.workload import poisson_arrivals, random_words
from edge_runtime.errors import ConfigError, EdgeError

PROBE_WORDS = (4, 36)
"""Two prompts that tell how many tokens a word takes, and how many a prompt takes besides."""
_TOLERANCE = 0.25
"""Words differ in tokens, so a prompt comes near the length asked for; the result tells what it was."""


def run(job: LoadJob) -> Result:
    """Measure the server. ConfigError if it cannot be asked so; EdgeError if it answers nothing."""
    client = Client(job.url, job.api_key)
    model = _model(client, job.model)
    machine = this_machine()
    ask = _Asker(client, job, model)
    outcomes = _open_loop(ask, job, job.rate) if job.rate is not None else _closed_loop(ask, job)
    replies = [outcome.reply for outcome in outcomes if outcome.reply is not None]
    failures = [outcome.failure for outcome in outcomes if outcome.failure is not None]
    if not replies:
        raise EdgeError(f"{job.url} answered none of {len(outcomes)} requests; the first failure: {failures[0]}")
    streams = [reply.times for reply in replies]
    seconds = max(stream.last for stream in streams) - min(stream.submitted for stream in streams)
    good = None
    if job.goodput is not None:
        good = sum(job.goodput.holds(s.ttft * 1e3, None if s.tpot is None else s.tpot * 1e3) for s in streams)
    return Result(
        created=now(),
        model=model,
        url=job.url,
        prompt_tokens=int(statistics.median(reply.prompt_tokens for reply in replies)),
        new_tokens=int(statistics.median(reply.completion_tokens for reply in replies)),
        concurrency=_most_at_once([(each.started, each.ended) for each in outcomes]),
        requests=len(replies),
        seed=job.seed,
        rate=job.rate,
        request_rate=len(replies) / seconds,
        output_tps=sum(reply.completion_tokens for reply in replies) / seconds,
        goodput=None if good is None else good / seconds,
        errors=dict(Counter(failure.kind for failure in failures)),
        machine=machine,
        **stream_figures(streams),
    )


@dataclass(frozen=True)
class Outcome:
    """What became of one request, and when it ran."""

    started: float
    ended: float
    reply: Reply | None = None
    failure: RequestFailed | None = None


class _Asker:
    """Asks for answers of the wanted shape. Finds out first, and warms the server up, with a few requests."""

    def __init__(self, client: Client, job: LoadJob, model: str) -> None:
        self._client = client
        self._job = job
        self._body: dict[str, Any] = {"model": model, "temperature": 0, "ignore_eos": True}
        rng = np.random.default_rng((job.seed, 1))
        few, many = (self._probe(random_words(rng, words), 1) for words in PROBE_WORDS)
        per_word = (many.prompt_tokens - few.prompt_tokens) / (PROBE_WORDS[1] - PROBE_WORDS[0])
        besides = few.prompt_tokens - per_word * PROBE_WORDS[0]
        words = max(1, round((job.prompt_tokens - besides) / max(per_word, 0.1)))
        tokens = self._probe(random_words(rng, words), job.new_tokens).prompt_tokens
        if abs(tokens - job.prompt_tokens) > job.prompt_tokens * _TOLERANCE:
            raise ConfigError(
                f"--prompt-tokens {job.prompt_tokens} cannot be met here: {words} words, the nearest, make {tokens} "
                "tokens as the server counts them"
            )
        rng = np.random.default_rng(job.seed)
        self._prompts = [random_words(rng, words) for _ in range(job.total)]

    def __call__(self, index: int, due: float | None = None) -> Outcome:
        """Send request ``index``. ``due``: when it should have been sent, from which its times count."""
        started = time.perf_counter()
        try:
            reply = self._send(self._prompts[index], self._job.new_tokens, due)
        except RequestFailed as failure:
            return Outcome(started, time.perf_counter(), failure=failure)
        return Outcome(started, time.perf_counter(), reply=reply)

    def _probe(self, prompt: str, new_tokens: int) -> Reply:
        try:
            return self._send(prompt, new_tokens)
        except RequestFailed as failure:
            if failure.kind in ("400", "422") and self._body.pop("ignore_eos", None):  # not in OpenAI's own API
                return self._probe(prompt, new_tokens)
            hint = "; try --chat" if failure.kind == "404" and self._job.endpoint == "completions" else ""
            raise ConfigError(f"{self._job.url} does not answer as needed: {failure}{hint}") from failure

    def _send(self, prompt: str, new_tokens: int, due: float | None = None) -> Reply:
        return self._client.ask(self._job.endpoint, {**self._body, "max_tokens": new_tokens}, prompt, due)


def _model(client: Client, wanted: str | None) -> str:
    models = client.models()
    there = ", ".join(models) or "none"
    if wanted is not None:
        if wanted not in models:
            raise ConfigError(f"{client.url} has no model {wanted!r}; it has: {there}")
        return wanted
    if len(models) != 1:
        raise ConfigError(f"which model of {client.url}? name it with --model; it has: {there}")
    return models[0]


def _closed_loop(ask: Callable[[int], Outcome], job: LoadJob) -> list[Outcome]:
    """Keep ``concurrency`` requests running until all are answered."""
    lock = threading.Lock()
    waiting = iter(range(job.total))

    def line() -> list[Outcome]:
        outcomes: list[Outcome] = []
        while True:
            with lock:
                index = next(waiting, None)
            if index is None:
                return outcomes
            outcomes.append(ask(index))

    return _gather([_start(line) for _ in range(job.concurrency or 1)])


def _open_loop(ask: Callable[[int, float], Outcome], job: LoadJob, rate: float) -> list[Outcome]:
    """Send each request when it arrives, whatever has become of those before."""
    begin = time.perf_counter()
    running = []
    for index, arrival in enumerate(poisson_arrivals(np.random.default_rng((job.seed, 2)), rate, job.total)):
        due = begin + arrival
        time.sleep(max(0.0, due - time.perf_counter()))
        running.append(_start(partial(_one, ask, index, due)))
    return _gather(running)


def _one(ask: Callable[[int, float], Outcome], index: int, due: float) -> list[Outcome]:
    return [ask(index, due)]


def _start(work: Callable[[], list[Outcome]]) -> Future[list[Outcome]]:
    """In a thread for which Ctrl-C does not wait."""
    future: Future[list[Outcome]] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _gather(running: Sequence[Future[list[Outcome]]]) -> list[Outcome]:
    while wait(running, timeout=0.5).not_done:  # with a timeout, because Windows delivers Ctrl-C only between waits
        pass
    return [outcome for future in running for outcome in future.result()]


def _most_at_once(spans: Sequence[tuple[float, float]]) -> int:
    """How many of ``spans``, (start, end), lie over one another at most."""
    # at equal times an end comes first: what follows it at once was never beside it
    edges = sorted([(start, 1) for start, _ in spans] + [(end, -1) for _, end in spans])
    return max(itertools.accumulate(step for _, step in edges))
