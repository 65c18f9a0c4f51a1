"""What /metrics counts, and with what."""

from __future__ import annotations

import asyncio
import sys
import threading
from contextlib import suppress
from functools import partial

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from edge_runtime.request import Chunk, Usage
from edge_runtime.server.app import create_app
from edge_runtime.server.metrics import Counting, Meter
from edge_runtime.server.tracing import Tracing
from edge_runtime.tracing.recorder import Recorder
from tests.runtime.machine import Failing
from tests.server.served import CHAT, TEXT, FakeModel, running, wait_until


def value(page: str, name: str, **labels: str) -> float:
    wanted = [f'{key}="{label}"' for key, label in labels.items()]
    rows = [row for row in page.splitlines() if row.startswith((name + "{", name + " "))]
    return sum(float(row.rsplit(" ", 1)[1]) for row in rows if all(each in row for each in wanted))


def test_metrics() -> None:
    gate = threading.Event()
    gate.set()
    model = FakeModel(before_forward=lambda batch: gate.wait(30) or None)  # type: ignore[func-returns-value]
    with running(create_app(model)) as url:
        for _ in range(3):
            assert httpx.post(f"{url}/v1/chat/completions", json=CHAT | {"ignore_eos": True}).status_code == 200
        assert httpx.post(f"{url}/v1/completions", json=TEXT | {"max_tokens": 0}).status_code == 400
        assert httpx.get(f"{url}/made/up").status_code == 404
        page = httpx.get(f"{url}/metrics")
        assert page.headers["content-type"].startswith("text/plain; version=")
        text = page.text
        assert value(text, "edge_glm_http_requests_total", path="/v1/chat/completions", status="200") == 3
        assert value(text, "edge_glm_http_requests_total", path="/v1/completions", status="400") == 1
        assert value(text, "edge_glm_http_requests_total", path="other", status="404") == 1
        assert "/made/up" not in text
        assert value(text, "edge_glm_generations_total", model="fake", tier="local", outcome="length") == 3
        assert value(text, "edge_glm_tokens_total", kind="completion") == 9
        assert value(text, "edge_glm_time_to_first_token_seconds_count", model="fake") == 3
        assert value(text, "edge_glm_time_per_output_token_seconds_count") == 3
        assert value(text, "edge_glm_kv_cache_tokens") == 8192
        assert value(text, "edge_glm_requests_running") == 0
        assert 'device="fake:cpu"' in text
        assert value(text, "process_resident_memory_bytes") > 0 or sys.platform != "linux"

        gate.clear()
        with (
            httpx.stream("POST", f"{url}/v1/completions", json=TEXT | {"stream": True, "max_tokens": 50}) as stream,
            httpx.Client(base_url=url) as client,
        ):
            wait_until(lambda: value(client.get("/metrics").text, "edge_glm_http_requests_in_flight") == 2)
            stream.close()
        gate.set()
        wait_until(lambda: value(httpx.get(f"{url}/metrics").text, "edge_glm_generations_total", outcome="cancelled"))

        model.decoder.before_forward = Failing(0)
        failed = httpx.post(f"{url}/v1/chat/completions", json=CHAT)
        assert failed.status_code == 500
        text = httpx.get(f"{url}/metrics").text
        assert value(text, "edge_glm_generations_total", outcome="error") == 1
        assert value(text, "edge_glm_generations_total", outcome="cancelled") == 1  # the one before
    model.engine.close()


@pytest.mark.parametrize(
    ("sent", "raised", "counted"),
    [
        (200, None, "200"),
        (None, None, "499"),  # the client has left
        (None, RuntimeError, "500"),
        (None, asyncio.CancelledError, "500"),  # the server ends
        (499, RuntimeError, "499"),
        (200, asyncio.CancelledError, "200"),
    ],
)
def test_a_request_counts_with_what_was_sent(
    sent: int | None, raised: type[BaseException] | None, counted: str
) -> None:
    """Or else with what will be, by who stands outside."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if sent is not None:
            await send({"type": "http.response.start", "status": sent, "headers": []})
        if raised is not None:
            raise raised

    async def call() -> None:
        async def receive() -> Message:
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            pass

        with suppress(RuntimeError, asyncio.CancelledError):
            await Tracing(Counting(app, meter), recorder)(scope, receive, send)

    meter, recorder = Meter(), Recorder()
    scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "state": {"caller": ""}}
    asyncio.run(call())
    assert value(meter.page().decode(), "edge_glm_http_requests_total", status=counted) == 1
    assert recorder.ring.newest(1)[0].about["status"] == int(counted)


def test_of_several_generations_those_that_were_cut_off_count() -> None:
    """Whether something of them had come or not; others count with their own end."""
    meter = Meter()
    watched = meter.watch("fake")
    watched.chunk(0, Chunk("a", (1,), "stop"))
    watched.chunk(1, Chunk("a", (1,), "length"))
    watched.chunk(1, Chunk("a", (1,), index=1))
    for _ in range(2):
        watched.end(Usage(1, 3), generations=4)
    counted = partial(value, meter.page().decode(), "edge_glm_generations_total")
    assert [counted(outcome=each) for each in ("stop", "length", "cancelled")] == [1, 1, 3]
