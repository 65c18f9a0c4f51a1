"""The scenarios that run in a process with the model. To add one: a function here, and its figures in ``Result``."""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from devices.base import DecoderLimits, DecoderOptions
from edge_runtime.bench.job import TAIL_TOKENS, Job
from edge_runtime.bench.result import Copying, SharedPrefix, Shares
from edge_runtime.bench.timing import StreamTimes, steady
from edge_runtime.bench.workload import bundled_text, copy_tasks, random_tokens
from edge_runtime.engine import EngineStats
from edge_runtime.errors import ConfigError
from edge_runtime.exporting import Progress
from edge_runtime.llm import EdgeLLM
from edge_runtime.measurements import Shape
from edge_runtime.sampling import SamplingParams
from edge_runtime.tracing.trace import Trace

COPY_TOKENS = 160
"""Longest answer that copies."""
START_TOKENS = 16
"""The short prompt after which the first token is awaited."""


class MeasuredLLM(EdgeLLM):
    """An :class:`EdgeLLM` whose engine can be looked into."""

    @property
    def limits(self) -> DecoderLimits:
        return self._loaded.engine.limits

    @property
    def options(self) -> DecoderOptions:
        """It was opened with."""
        return self._loaded.options

    @property
    def tuned(self) -> str | None:
        return self._loaded.tuned

    @property
    def vocab_size(self) -> int:
        return self._loaded.engine.vocab_size

    @cached_property
    def plain_token(self) -> int:
        """A token that is text by itself, wherever it stands: the first such of the bundled text."""
        decode = self.tokenizer.decode
        ids = self.tokenizer.encode(bundled_text())
        return next((token for token in ids if 0 < len(decode([token])) < len(decode([token, token]))), ids[0])

    def same_word(self, max_tokens: int | None = None) -> SamplingParams:
        """Of answers that are always :attr:`plain_token`: answers to random tokens are full of pieces that are no text
        until others have come, and a reader would see several tokens at once."""
        bias = {self.plain_token: 100.0}
        return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, logit_bias=bias)


def open_model(
    job: Job, *, prefix_cache: bool, prompt_lookup: bool = False, progress: Progress | None = None
) -> MeasuredLLM:
    """Open the job's model; ConfigError if it cannot hold what is to be measured."""
    llm = MeasuredLLM(
        job.ref,
        job.device,
        job.memory_budget,
        weights=job.weights,
        threads=job.threads,
        kv_type=job.kv_type,
        max_sequences=max(job.concurrency, DecoderOptions.max_sequences),
        batch_invariant=job.batch_invariant,
        prompt_lookup=prompt_lookup,
        prefix_cache_bytes=None if prefix_cache else 0,
        prefix_store_bytes=0,
        workload=Shape(job.prompt_tokens, job.new_tokens, job.concurrency).workload,
        tuning=True if job.tuning is None else job.tuning,
        progress=progress,
    )
    try:
        job.check_room(llm.max_context, llm.limits.kv_tokens)
    except ConfigError:
        llm.close()
        raise
    return llm


@dataclass(frozen=True)
class Stream:
    """One answer, with the engine's clocks at its first and last piece."""

    times: StreamTimes
    at_first: EngineStats
    at_last: EngineStats
    cached_tokens: int
    trace: Trace


def first_token(llm: MeasuredLLM, job: Job) -> None:
    """Come to the first token after a short prompt."""
    rng = np.random.default_rng((job.seed, 1))
    answers(llm, [random_tokens(rng, min(START_TOKENS, job.prompt_tokens), llm.vocab_size)], llm.same_word(1))


def speed(llm: MeasuredLLM, job: Job) -> list[list[Stream]]:
    """The streams of each round: random prompts, all submitted at once, answers of full length."""
    rng = np.random.default_rng(job.seed)
    rounds = []
    for _ in range(1 + job.repeats):
        prompts = [random_tokens(rng, job.prompt_tokens, llm.vocab_size) for _ in range(job.concurrency)]
        rounds.append(answers(llm, prompts, llm.same_word(job.new_tokens)))
    return rounds[1:]


def shares(rounds: Sequence[Sequence[Stream]]) -> Shares | None:
    """Of the time in which all streams decode; None when there is none."""
    wall = forward = inference = 0.0
    for streams in rounds:
        by_times = {id(stream.times): stream for stream in streams}
        window = steady([stream.times for stream in streams])
        if window is not None:
            start, end = (by_times[id(times)] for times in window)
            wall += end.times.last - start.times.first
            forward += end.at_last.forward_seconds - start.at_first.forward_seconds
            inference += end.at_last.inference_seconds - start.at_first.inference_seconds
    if wall == 0:
        return None
    return Shares(inference / wall, (forward - inference) / wall, 1 - forward / wall)


def shared_prefix(llm: MeasuredLLM, job: Job, tokens: int) -> SharedPrefix:
    """Pairs of prompts with the same first ``tokens`` and other tails: the first pays for them, the second does not."""
    rng = np.random.default_rng((job.seed, 2))
    pairs = []
    for _ in range(1 + job.repeats):
        prefix = random_tokens(rng, tokens, llm.vocab_size)
        tails = [random_tokens(rng, TAIL_TOKENS, llm.vocab_size) for _ in range(2)]
        pairs.append([answers(llm, [prefix + tail], llm.same_word(1))[0] for tail in tails])
    del pairs[0]
    if not any(warm.cached_tokens for _, warm in pairs):
        raise ConfigError(
            f"--shared-prefix {tokens} is too long to be kept: prefix and new prompt must fit the KV cache of "
            f"{llm.limits.kv_tokens} tokens together"
        )
    return SharedPrefix(
        tokens=tokens,
        cached_tokens=min(warm.cached_tokens for _, warm in pairs),
        cold_ttft_ms=statistics.median(cold.times.ttft for cold, _ in pairs) * 1e3,
        warm_ttft_ms=statistics.median(warm.times.ttft for _, warm in pairs) * 1e3,
        speedup=statistics.median(cold.times.ttft / warm.times.ttft for cold, warm in pairs),
    )


def copying(plain: MeasuredLLM, drafting: MeasuredLLM, job: Job) -> Copying:
    """The same tasks of both, in turns; ConfigError if the model has nothing to say to any of them."""
    ratios, rates, accepted, drafted, identical = [], [], 0, 0, 0
    tasks = copy_tasks()
    for task in tasks.values():
        rounds = []
        for _ in range(1 + job.repeats):
            before = drafting.stats
            copies = [_copy(llm, task) for llm in (plain, drafting)]
            after = drafting.stats
            rounds.append([rate for _, rate in copies])
        identical += copies[0][0] == copies[1][0]
        drafted += after.drafted_tokens - before.drafted_tokens
        accepted += after.accepted_tokens - before.accepted_tokens
        measured = [(ours, theirs) for theirs, ours in rounds[1:] if ours and theirs]
        if measured:
            ratios.append(statistics.median(ours / theirs for ours, theirs in measured))
            rates.append([statistics.median(column) for column in zip(*measured, strict=True)])
    if not rates:
        raise ConfigError("--copy needs answers of two tokens or more, and this model ends at once; leave it out")
    lookup_tps, plain_tps = (statistics.median(column) for column in zip(*rates, strict=True))
    return Copying(
        tasks=len(tasks),
        identical=identical,
        plain_tps=plain_tps,
        lookup_tps=lookup_tps,
        speedup=statistics.median(ratios),
        accepted=accepted / max(drafted, 1),
    )


def _copy(llm: MeasuredLLM, task: str) -> tuple[list[int], float | None]:
    """The answer, and tokens per second after its first piece; None if all of it came in one."""
    params = SamplingParams(temperature=0, max_tokens=COPY_TOKENS)
    tokens: list[int] = []
    first = None
    with closing(llm.stream(task, params)) as chunks:
        for chunk in chunks:
            tokens += chunk.token_ids
            last = time.perf_counter()
            if first is None and tokens:
                first = last, len(tokens)
    if first is None or len(tokens) == first[1]:
        return tokens, None
    return tokens, (len(tokens) - first[1]) / (last - first[0])


def loss(llm: MeasuredLLM) -> tuple[float, int]:
    """Mean negative log-likelihood of the bundled text, and over how many tokens: as many as the context takes."""
    ids = llm.tokenizer.encode(bundled_text())[: min(llm.max_context, llm.limits.max_prompt)]
    scores = llm.score(ids)
    return float(-scores.mean(dtype=np.float64)), len(scores)


def answers(
    llm: MeasuredLLM, prompts: Sequence[list[int]], params: SamplingParams, at_once: int | None = None
) -> list[Stream]:
    """To ``prompts``, ``at_once`` (None: all) at a time, each followed by the next, from threads that read the answers,
    as callers do."""
    parties = min(at_once or len(prompts), len(prompts))
    ready = threading.Barrier(parties)  # starting a thread takes its time while the engine's is running
    begun = itertools.count()

    def answer(prompt: list[int]) -> Stream:
        if next(begun) < parties:  # the first of each thread
            ready.wait()
        return _read(llm, prompt, params)

    with ThreadPoolExecutor(parties) as threads:
        return list(threads.map(answer, prompts))


def _read(llm: MeasuredLLM, prompt: list[int], params: SamplingParams) -> Stream:
    submitted = time.perf_counter()
    arrivals: list[tuple[float, int]] = []
    stats: list[EngineStats] = []
    with closing(llm.stream(prompt, params)) as chunks:
        for chunk in chunks:
            if chunk.token_ids:
                arrivals.append((time.perf_counter(), len(chunk.token_ids)))
                stats[1:] = [llm.stats]
    assert chunk.usage is not None
    assert chunks.trace is not None
    times = StreamTimes(submitted, tuple(arrivals))
    return Stream(times, stats[0], stats[-1], chunk.usage.cached_tokens, chunks.trace)
