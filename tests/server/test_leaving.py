"""Clients that leave, and a server that stops: nothing goes on that nobody waits for, nothing is cut off."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from devices.base import Step
from edge_runtime.sampling import SamplingParams
from edge_runtime.server.app import create_app
from tests.server.served import CHAT, TEXT, FakeModel, running, wait_until


@contextmanager
def sent(url: str, path: str, request: dict[str, Any]) -> Iterator[socket.socket]:
    """A raw connection with the request on its way."""
    parts = urlsplit(url)
    body = json.dumps(request).encode()
    with socket.create_connection((parts.hostname, parts.port)) as connection:
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        yield connection


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_leaving_ends_the_generation(path: str, stream: bool, n: int) -> None:
    steps = 0

    def slow(batch: Sequence[Step]) -> None:
        nonlocal steps
        steps += 1
        time.sleep(0.01)

    model = FakeModel(before_forward=slow, prefix_cache_bytes=0)
    base = CHAT if path.endswith("chat/completions") else TEXT
    request = base | {"stream": stream, "max_tokens": 450, "ignore_eos": True, "n": n}
    with running(create_app(model)) as url:
        with sent(url, path, request) as connection:
            wait_until(lambda: model.engine.stats.running)
            if stream:
                received = b""
                while received.count(b"data: ") < 4:
                    received += connection.recv(4096)
        wait_until(lambda: model.engine.stats.running == 0)
        assert steps < 440  # not because it came to its end
        wait_until(lambda: not model.decoder.sequences)
        model.decoder.check_integrity()
        assert httpx.post(f"{url}{path}", json=base).status_code == 200
    model.engine.close()


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_frees_the_sequence_within_the_step_that_runs(stream: bool) -> None:
    gate, blocked, steps = threading.Event(), threading.Event(), 0

    def before(batch: Sequence[Step]) -> None:
        nonlocal steps
        steps += 1
        if steps >= 5:
            blocked.set()
            gate.wait(30)

    model = FakeModel(before_forward=before, prefix_cache_bytes=0)
    request = CHAT | {"stream": stream, "max_tokens": 450, "ignore_eos": True}
    with running(create_app(model)) as url:
        with sent(url, "/v1/chat/completions", request):
            assert blocked.wait(30)
        # the server has noticed, while the step runs
        wait_until(lambda: 'outcome="cancelled"' in httpx.get(f"{url}/metrics").text)
        gate.set()
        wait_until(lambda: not model.decoder.sequences)
        assert steps == 5
    model.engine.close()


def test_leaving_while_queued_frees_the_place() -> None:
    gate = threading.Event()
    model = FakeModel(before_forward=lambda batch: bool(gate.wait()) and None)
    with running(create_app(model)) as url:
        blocker = model.start_completion("a", SamplingParams(max_tokens=1))
        wait_until(lambda: model.engine.stats.running)
        with sent(url, "/v1/chat/completions", CHAT | {"stream": True}):
            wait_until(lambda: model.engine.stats.waiting)
        gate.set()
        wait_until(lambda: model.engine.stats.running == model.engine.stats.waiting == 0)
        assert httpx.post(f"{url}/v1/chat/completions", json=CHAT).status_code == 200
    blocker.close()
    model.engine.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_ends_serve(number: signal.Signals) -> None:
    """And whoever has called it goes on, to close the models."""
    program = (
        "from edge_runtime.server.app import create_app\n"
        "from edge_runtime.server.run import serve\n"
        "from tests.server.served import FakeModel\n"
        "model = FakeModel()\n"
        "serve(create_app(model), port=0)\n"
        "model.engine.close()\n"
        "print('closed')\n"
    )
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        while "serving on http://127.0.0.1:" not in process.stderr.readline():
            assert process.poll() is None
        try:
            process.send_signal(number)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()  # or leaving the context would wait for a server that does not end
    assert (process.returncode, out) == (0, "closed\n"), err


def test_shutdown_lets_answers_finish() -> None:
    model = FakeModel(before_forward=lambda batch: time.sleep(0.01))
    request = CHAT | {"max_tokens": 30, "ignore_eos": True}
    answers: list[httpx.Response] = []
    with running(create_app(model)) as url:
        asking = threading.Thread(target=lambda: answers.append(httpx.post(f"{url}/v1/chat/completions", json=request)))
        asking.start()
        wait_until(lambda: model.engine.stats.running)
    asking.join()
    assert answers[0].json()["usage"]["completion_tokens"] == 30
    model.engine.close()


def test_shutdown_tells_answers_that_have_no_more_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_runtime.server.run.GRACE_SECONDS", 0.3)
    model = FakeModel(before_forward=lambda batch: time.sleep(0.05))
    request = CHAT | {"max_tokens": 400, "ignore_eos": True}
    answers: list[httpx.Response] = []
    with running(create_app(model)) as url:
        bodies = [request, request | {"stream": True}]
        asking = [
            threading.Thread(
                target=lambda body=body: answers.append(httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60))
            )
            for body in bodies
        ]
        for thread in asking:
            thread.start()
        wait_until(lambda: model.engine.stats.running == 2)
    for thread in asking:
        thread.join()
    whole, streamed = sorted(answers, key=lambda answer: "event-stream" in answer.headers["content-type"])
    assert whole.status_code == 503
    assert whole.json()["error"]["message"]
    events = [line.removeprefix("data: ") for line in streamed.text.splitlines() if line.startswith("data: ")]
    assert len(events) > 2
    assert any("error" in json.loads(event) for event in events[-2:] if event != "[DONE]"), events[-2:]
