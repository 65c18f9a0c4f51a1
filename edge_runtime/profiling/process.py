"""Start the process that is profiled, and end it with this one."""

from __future__ import annotations

import msgspec

from edge_runtime.bench import process
from edge_runtime.bench.job import Job
from edge_runtime.errors import ConfigError, EdgeError
from edge_runtime.profiling.result import Profile
from edge_runtime.profiling.worker import Answer, Order

DEFAULT_REQUESTS = 20


def run(job: Job, requests: int = DEFAULT_REQUESTS) -> Profile:
    """Prepare the model in one process, profile it in another. Errors as :class:`edge_runtime.EdgeLLM` raises them;
    ConfigError for fewer requests than ``job.concurrency``."""
    if requests < job.concurrency:
        raise ConfigError(
            f"--requests must be at least {job.concurrency} (one for each of --concurrency), not {requests}"
        )
    process.prepare(job)
    order = msgspec.json.encode(Order(job, requests))
    answer = msgspec.json.decode(process.ask("edge_runtime.profiling.worker", order), type=Answer)
    if answer.profile is None:
        raise EdgeError(answer.error or "the measuring process said nothing; run it again")
    return answer.profile
