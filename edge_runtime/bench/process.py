"""Start the measuring process, and end it with this one."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import suppress

import msgspec

from edge_runtime.bench.job import Job
from edge_runtime.bench.result import Result
from edge_runtime.bench.worker import Answer, Order
from edge_runtime.errors import EdgeError

COMMAND = (sys.executable, "-P", "-m", "edge_runtime.bench.worker")  # -P: not what lies in the current folder


def run(job: Job) -> Result:
    """Prepare the model in one process, measure it in another. Errors as :class:`edge_runtime.EdgeLLM` raises them."""
    _work(job, prepare=True)
    result = _work(job, prepare=False).result
    assert result is not None
    return result


def _work(job: Job, *, prepare: bool) -> Answer:
    started = time.time()
    with subprocess.Popen(COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        try:
            with suppress(BrokenPipeError):  # it has died: its exit code tells
                worker.stdin.write(msgspec.json.encode(Order(job, started, prepare)) + b"\n")
                worker.stdin.flush()  # and left open: the worker ends when it closes
            data = worker.stdout.read()
        except BaseException:  # Ctrl-C
            worker.kill()
            raise
        code = worker.wait()
    if code or not data:
        how = f"was ended by signal {-code}; is there enough memory?" if code < 0 else f"ended with exit code {code}"
        raise EdgeError(f"the measuring process {how}")
    answer = msgspec.json.decode(data, type=Answer)
    if answer.error is not None:
        raise EdgeError(answer.error)
    return answer
