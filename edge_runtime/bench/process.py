"""Start the measuring process, and end it with this one."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import msgspec

from edge_runtime.bench.job import Job
from edge_runtime.bench.result import Result
from edge_runtime.bench.worker import Answer, Order
from edge_runtime.errors import EdgeError

COMMAND = (sys.executable, "-P", "-m")  # -P: not what lies in the current folder


def run(job: Job) -> Result:
    """Prepare the model in one process, measure it in another. Errors as :class:`edge_runtime.EdgeLLM` raises them."""
    prepare(job)
    return measure(job)


def prepare(job: Job) -> None:
    """Fetch, export and open the model once, in a process that shows its progress."""
    _work(job, prepare=True)


def measure(job: Job, limit_s: float | None = None) -> Result:
    """Measure a model that was prepared. EdgeError also if it takes longer than ``limit_s``."""
    result = _work(job, prepare=False, limit_s=limit_s).result
    assert result is not None
    return result


def _work(job: Job, *, prepare: bool, limit_s: float | None = None) -> Answer:
    order = msgspec.json.encode(Order(job, time.time(), prepare))
    answer = msgspec.json.decode(ask("edge_runtime.bench.worker", order, limit_s), type=Answer)
    if answer.error is not None:
        raise EdgeError(answer.error)
    return answer


def ask(module: str, order: bytes, limit_s: float | None = None) -> bytes:
    """What ``module``, run as a process of its own by :func:`edge_runtime.bench.child.serve`, answers to a line.

    EdgeError if it dies, or takes longer than ``limit_s``."""
    command = (*COMMAND, module)  # this Python and a module of ours
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as worker:  # nosec B603  # so
        assert worker.stdin is not None
        assert worker.stdout is not None
        try:
            with _ended_after(limit_s, worker) as late:
                with suppress(BrokenPipeError):  # it has died: its exit code tells
                    worker.stdin.write(order + b"\n")
                    worker.stdin.flush()  # and left open: the worker ends when it closes
                data = worker.stdout.read()
        except BaseException:  # Ctrl-C
            worker.kill()
            raise
        code = worker.wait()
    if late.is_set():
        raise EdgeError(f"the measuring process was ended, for it took more than the {limit_s:.0f} s that it was given")
    if code or not data:
        how = f"was ended by signal {-code}; is there enough memory?" if code < 0 else f"ended with exit code {code}"
        raise EdgeError(f"the measuring process {how}")
    return data


@contextmanager
def _ended_after(limit_s: float | None, worker: subprocess.Popen[bytes]) -> Iterator[threading.Event]:
    """The event is set if the worker had to be ended."""
    late = threading.Event()

    def end() -> None:
        late.set()
        worker.kill()

    timer = None if limit_s is None else threading.Timer(limit_s, end)
    if timer is not None:
        timer.start()
    try:
        yield late
    finally:
        if timer is not None:
            timer.cancel()
