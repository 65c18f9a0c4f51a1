"""Traces as an OpenTelemetry collector gets them."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

pytest.importorskip("opentelemetry.sdk")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.trace import Span

from edge_runtime.cli import serve as serving
from edge_runtime.cli.main import main
from edge_runtime.errors import ConfigError
from edge_runtime.tracing import otel
from edge_runtime.tracing.otel import CLOSE_S, OtelSink
from edge_runtime.tracing.trace import Trace


class Kept(SpanExporter):
    def __init__(self) -> None:
        self.spans: list[ReadableSpan] = []

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.spans += spans
        return SpanExportResult.SUCCESS


def ended(parent: str | None = None, status: int = 200, id: str = "a" * 32, sampled: bool = True) -> Trace:
    trace = Trace(id, parent, sampled)
    trace.say(path="/v1/chat/completions", status=status, model="m", prompt_tokens=7, completion_tokens=3, tier="local")
    lane = trace.lane("engine", trace.started)
    for number in range(1, 7):
        lane.mark("decode" if number % 2 else "sample", trace.started + 1000 * number)
    trace.ended = trace.started + 10_000
    return trace


def test_a_root_with_a_child_for_each_part() -> None:
    kept, trace = Kept(), ended()
    sink = OtelSink(kept)
    sink(trace)
    sink.close()
    spans = {span.name: span for span in kept.spans}
    assert set(spans) == {"/v1/chat/completions", "decode", "sample"}
    root, decode = spans["/v1/chat/completions"], spans["decode"]
    assert root.parent is None
    assert root.context.trace_id == int("a" * 32, 16)
    assert dict(root.attributes or {}) == {
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "gen_ai.request.model": "m",
        "gen_ai.usage.input_tokens": 7,
        "gen_ai.usage.output_tokens": 3,
        "edge_glm.tier": "local",
    }
    assert (root.start_time, root.end_time) == (trace.unix_ns, trace.unix_ns + 10_000)
    assert decode.parent is not None
    assert decode.parent.span_id == root.context.span_id
    assert decode.attributes is not None
    assert (decode.attributes["edge_glm.count"], decode.attributes["edge_glm.busy_ms"]) == (3, 0.003)
    assert (decode.start_time, decode.end_time) == (trace.unix_ns, trace.unix_ns + 5000)


def test_under_the_callers_span_and_with_its_failure() -> None:
    kept = Kept()
    sink = OtelSink(kept)
    sink(ended("b" * 16, status=500))
    sink.close()
    root = next(span for span in kept.spans if span.name == "/v1/chat/completions")
    assert root.parent is not None
    assert (root.parent.span_id, root.context.trace_id) == (int("b" * 16, 16), int("a" * 32, 16))
    assert not root.status.is_ok


def test_what_the_caller_does_not_record_is_not_sent() -> None:
    kept = Kept()
    sink = OtelSink(kept)
    sink(ended("b" * 16, sampled=False))
    sink.close()
    assert kept.spans == []


def test_threads_send_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each under its own id."""
    kept = Kept()
    sink = OtelSink(kept)
    start_span = sink._tracer.start_span

    def late(*given: Any, **named: Any) -> Span:
        time.sleep(0.002)
        return start_span(*given, **named)

    monkeypatch.setattr(sink._tracer, "start_span", late)
    traces = [ended(id=f"{number:032x}") for number in range(1, 21)]
    for number, trace in enumerate(traces, start=1):
        trace.say(number=number)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(sink, traces))
    sink.close()
    roots = [span for span in kept.spans if span.parent is None]
    assert len(roots) == 20
    assert all(span.context.trace_id == (span.attributes or {})["edge_glm.number"] for span in roots)


def test_closing_does_not_wait_for_a_collector_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "*")
    sink = OtelSink()
    sink(ended())
    before = time.monotonic()
    sink.close()
    assert time.monotonic() - before < CLOSE_S + 1


def test_over_otlp(monkeypatch: pytest.MonkeyPatch) -> None:
    """To a collector over HTTP, as OpenTelemetry's own variables say."""
    bodies: list[bytes] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *given: Any) -> None:
            return

    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
            monkeypatch.setenv("NO_PROXY", "*")
            sink = OtelSink()
            sink(ended())
            sink.close()
        finally:
            server.shutdown()
            thread.join()
    names = {
        span.name
        for body in bodies
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    }
    assert names == {"/v1/chat/completions", "decode", "sample"}


def test_without_opentelemetry_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(otel, "NEEDED", ("no.such.module",))
    with pytest.raises(ConfigError, match=r"edge-glm\[otel\]"):
        OtelSink()
    opened: list[object] = []
    monkeypatch.setattr(serving, "open_served", lambda *given: opened.append(given))  # that may take long
    assert main(["serve", "synthetic:tiny", "--otel"]) == 1
    assert opened == []


def test_about_is_plain() -> None:
    assert json.loads(json.dumps(ended().about))["tier"] == "local"
