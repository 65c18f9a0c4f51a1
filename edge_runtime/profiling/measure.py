"""A whole profile in this process: requests, then the engine's operators, then what the machine can do."""

from __future__ import annotations

import itertools
from contextlib import closing

import numpy as np

from edge_runtime.bench import local
from edge_runtime.bench.job import Job
from edge_runtime.bench.local import MeasuredLLM, Stream
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
            _requests(llm, job, job.concurrency, seed=1)
            clocks.append(Clock.read())
            timeline.mark("requests")
            streams = _requests(llm, job, requests, seed=0)
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
    traces = [stream.trace for stream in streams]
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
        requests=len(streams),
        seed=job.seed,
        covered=min(trace.covered for trace in traces),
        wall_ms=spread([trace.wall / 1e6 for trace in traces]),
        ttft_ms=spread([stream.times.ttft * 1e3 for stream in streams]),
        tpot_ms=spread([(stream.times.tpot or 0.0) * 1e3 for stream in streams]),
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


def _requests(llm: MeasuredLLM, job: Job, count: int, seed: int) -> list[Stream]:
    rng = np.random.default_rng((job.seed, seed))
    prompts = [random_tokens(rng, job.prompt_tokens, llm.vocab_size) for _ in range(count)]
    return local.answers(llm, prompts, llm.same_word(job.new_tokens), job.concurrency)
