"""The process that is measured: opens the model, runs the scenarios, answers with a line of JSON."""

from __future__ import annotations

import msgspec

from edge_runtime.bench.child import serve
from edge_runtime.bench.job import Job
from edge_runtime.bench.measure import measure, prepare
from edge_runtime.bench.result import Result
from edge_runtime.cli.progress import Bars
from edge_runtime.errors import EdgeError


class Order(msgspec.Struct, frozen=True):
    """The line that the worker reads."""

    job: Job
    started: float
    """When the process was started, by ``time.time()``."""
    prepare: bool
    """Only prepare the model; there is no result then."""


class Answer(msgspec.Struct, frozen=True):
    """What the worker writes."""

    result: Result | None = None
    error: str | None = None


def obey(line: bytes) -> bytes:
    order = msgspec.json.decode(line, type=Order)
    try:
        if not order.prepare:
            return msgspec.json.encode(Answer(measure(order.job, order.started)))
        with Bars() as bars:
            prepare(order.job, bars)
        return msgspec.json.encode(Answer())
    except EdgeError as error:
        return msgspec.json.encode(Answer(error=str(error)))


if __name__ == "__main__":
    serve(obey)
