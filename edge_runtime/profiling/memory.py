"""What a model was planned to take, beside what it took."""

from __future__ import annotations

from typing import NamedTuple

from devices.host import host_memory
from edge_runtime.bench.job import Job
from edge_runtime.bench.local import MeasuredLLM
from edge_runtime.budgets import DEFAULT_SHARE
from edge_runtime.footprint import Model, Use, footprint
from edge_runtime.memory import parse_budget
from edge_runtime.profiling.resources import MemoryTimeline, thinned
from edge_runtime.profiling.result import Memory

MOST_SAMPLES = 1_000


def allowed(job: Job) -> tuple[int, bool]:
    """The budget in bytes, and whether it was given. To be asked before the model is opened, as what is free changes
    with it."""
    memory = host_memory()
    if job.memory_budget is None:
        return int(memory.free * DEFAULT_SHARE), False
    return parse_budget(job.memory_budget).within(lambda: memory.total), True


class Plan(NamedTuple):
    """Bytes."""

    parts: dict[str, int]
    """For the work at hand, in the order in which they are taken."""
    full: int
    """With the whole KV cache in use."""


def plan(job: Job, llm: MeasuredLLM) -> Plan | None:
    """None for a device with memory of its own, which is not looked at here."""
    if not llm.device.endswith(":cpu"):
        return None
    model, limits = Model.of(llm.package, llm.variant), llm.limits
    tokens = min(job.concurrency * (job.prompt_tokens + job.new_tokens), limits.kv_tokens)
    use = Use(tokens, limits.max_sequences, limits.prefill_chunk, llm.options.kv_type)
    parts = footprint(model, use)
    running = {"KV cache": parts.kv, "activations": parts.activations}
    beside = {"loading": parts.loading} if parts.loading > sum(running.values()) else running
    full = footprint(model, use._replace(tokens=limits.kv_tokens)).peak
    return Plan({"base": parts.base, "weights": parts.weights, **beside}, full)


def memory_of(planned: Plan | None, budget: tuple[int, bool], timeline: MemoryTimeline) -> Memory:
    """``timeline`` has ended."""
    nbytes, asked = budget
    return Memory(
        samples=thinned(timeline.samples, MOST_SAMPLES),
        marks=timeline.marks,
        peak=max(resident for _, resident in timeline.samples),
        budget=None if planned is None else nbytes,
        asked=asked,
        planned={} if planned is None else planned.parts,
        planned_full=None if planned is None else planned.full,
    )
