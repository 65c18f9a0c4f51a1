"""The process that is measured: reads an order, opens the model, runs the scenarios, answers with a line of JSON.

A process of its own, so that its peak memory is that of running the model, not of fetching and exporting it, and so
that its start can be timed. Started by :mod:`edge_runtime.bench.process`.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

import msgspec

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


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # engines print what they like; the answer must be alone
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C too, and ends this process
    order = msgspec.json.decode(sys.stdin.buffer.readline(), type=Order)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with answers:
        answers.write(msgspec.json.encode(_obey(order)))


def _obey(order: Order) -> Answer:
    try:
        if not order.prepare:
            return Answer(measure(order.job, order.started))
        with Bars() as bars:
            prepare(order.job, bars)
        return Answer()
    except EdgeError as error:
        return Answer(error=str(error))


def _end_with_parent() -> None:
    """Whatever ends the parent closes the pipe."""
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    main()
