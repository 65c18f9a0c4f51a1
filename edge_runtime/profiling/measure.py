"""A whole profile in this process: requests, then the engine's operators, then what the machine can do."""

from __future__ import annotations

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from edge_runtime.bench import local
from edge_runtime.bench.job import Job
from edge_runtime.bench.local import MeasuredLLM
from edge_runtime.bench.machine import this_machine
from edge_runtime.bench.measure import now
from edge_runtime.bench.workload import random_tokens
from edge_runtime.errors import EdgeError
from edge_runtime.profiling import memory, operators
from edge_runtime.profiling.charts import call_chart, request_chart
from edge_runtime.profiling.critical_path import critical_path
from edge_runtime.profiling.limits import higher, measure_limits
from edge_runtime.profiling.parts import part_times, spread, step_ms
from edge_runtime.profiling.resources import Clock, MemoryTimeline
from edge_runtime.profiling.result import Chart, Profile, Result
from edge_runtime.sampling import SamplingParams
from edge_runtime.tracing.trace import Trace


@dataclass(frozen=True)
class Answered:
    """One request; seconds."""

    trace: Trace
    ttft: float
    tpot: float


def measure(job: Job, requests: int) -> Profile:
    """EdgeError as :class:`edge_runtime.EdgeLLM` raises them; ConfigError if the model cannot hold the work."""
    machine = this_machine()  # now, while the load is that of others
    budget = memory.allowed(job)
    clocks = [Clock.read()]
    with MemoryTimeline() as timeline:
        timeline.mark("open")
        with closing(local.open_model(job, prefix_cache=False)) as llm:
            clocks.append(Clock.read())
            timeline.mark("warm up")
            ask(llm, job, job.concurrency, seed=1)
            clocks.append(Clock.read())
            timeline.mark("requests")
            answers = ask(llm, job, requests, seed=0)
            clocks.append(Clock.read())
            timeline.mark("close")
            spec, options = llm.package.spec(llm.variant), llm.options
            planned = memory.plan(job, llm)
            model, device, weights, tuned = llm.model_id, llm.device, llm.variant.weights, llm.tuned
    names = ("open", "warm up", "requests")
    limits = measure_limits(budget[0] // 2)
    counted: list[operators.Counted] = []
    no_operators = None
    try:
        counted = operators.count(
            spec,
            device,
            options,
            operators.Shape(job.prompt_tokens, job.new_tokens, job.concurrency, job.seed),
        )
    except EdgeError as error:  # what was measured is worth having without
        no_operators = str(error)
    limits = higher(limits, measure_limits(budget[0] // 2))
    traces = [each.trace for each in answers]
    ordered = sorted(traces, key=lambda trace: trace.wall)
    chosen = {"median": ordered[len(ordered) // 2], "P95": ordered[round(0.95 * (len(ordered) - 1))]}
    result = Result(
        created=now(),
        model=model,
        device=device,
        weights=weights,
        tuned=tuned,
        prompt_tokens=job.prompt_tokens,
        new_tokens=job.new_tokens,
        concurrency=job.concurrency,
        requests=len(answers),
        seed=job.seed,
        covered=min(trace.covered for trace in traces),
        wall_ms=spread([trace.wall / 1e6 for trace in traces]),
        ttft_ms=spread([each.ttft * 1e3 for each in answers]),
        tpot_ms=spread([each.tpot * 1e3 for each in answers]),
        parts=part_times(traces),
        critical_paths=[critical_path(trace, name) for name, trace in chosen.items()],
        phases=[operators.phase_of(each, limits, step_ms(traces, each.phase.name)) for each in counted],
        no_operators=no_operators,
        limits=limits,
        usage=[
            after.usage(name, before) for name, (before, after) in zip(names, itertools.pairwise(clocks), strict=True)
        ],
        memory=memory.memory_of(planned, budget, timeline),
        machine=machine,
    )
    charts: list[Chart] = [request_chart(trace, f"the {name} request") for name, trace in chosen.items()]
    charts += [chart for each in reversed(counted) if (chart := call_chart(each.phase)) is not None]
    return Profile(result, charts)


def ask(llm: MeasuredLLM, job: Job, requests: int, seed: int) -> list[Answered]:
    """So many requests, ``job.concurrency`` at once, each followed by the next."""
    rng = np.random.default_rng((job.seed, seed))
    prompts = [random_tokens(rng, job.prompt_tokens, llm.vocab_size) for _ in range(requests)]
    # always the same word, as in edge-glm bench: pieces of random tokens are no text until others have come
    bias = {llm.plain_token: 100.0}
    params = SamplingParams(temperature=0, max_tokens=job.new_tokens, ignore_eos=True, logit_bias=bias)
    ready = threading.Barrier(min(job.concurrency, requests))
    together = itertools.count()

    def answer(prompt: list[int]) -> Answered:
        if next(together) < ready.parties:  # the first of each thread: they begin at once
            ready.wait()
        return _read(llm, prompt, params)

    with ThreadPoolExecutor(job.concurrency) as threads:
        return list(threads.map(answer, prompts))


def _read(llm: MeasuredLLM, prompt: list[int], params: SamplingParams) -> Answered:
    started = time.perf_counter()
    first = last = None
    tokens = 0
    with closing(llm.stream(prompt, params)) as chunks:
        for chunk in chunks:
            if chunk.token_ids:
                tokens += len(chunk.token_ids)
                last = time.perf_counter()
                first = first or (last, tokens)
        trace = chunks.trace
    assert trace is not None
    assert first is not None
    assert last is not None
    return Answered(trace, first[0] - started, (last - first[0]) / max(tokens - first[1], 1))
