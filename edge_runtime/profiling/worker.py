"""The process that is profiled: opens the model, sends requests, answers with a line of JSON."""

from __future__ import annotations

import msgspec

from edge_runtime.bench.child import serve
from edge_runtime.bench.job import Job
from edge_runtime.errors import EdgeError
from edge_runtime.profiling.measure import measure
from edge_runtime.profiling.result import Profile


class Order(msgspec.Struct, frozen=True):
    """The line that the worker reads."""

    job: Job
    requests: int


class Answer(msgspec.Struct, frozen=True):
    """What the worker writes."""

    profile: Profile | None = None
    error: str | None = None


def obey(line: bytes) -> bytes:
    order = msgspec.json.decode(line, type=Order)
    try:
        return msgspec.json.encode(Answer(measure(order.job, order.requests)))
    except EdgeError as error:
        return msgspec.json.encode(Answer(error=str(error)))


if __name__ == "__main__":
    serve(obey)
