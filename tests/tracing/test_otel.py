"""Traces as an OpenTelemetry collector gets them."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

pytest.importorskip("opentelemetry.sdk")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from edge_runtime.errors import ConfigError
from edge_runtime.tracing import otel
from edge_runtime.tracing.otel import OtelSink
from edge_runtime.tracing.trace import Trace


class Kept(SpanExporter):
    def __init__(self) -> None:
        self.spans: list[ReadableSpan] = []

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.spans += spans
        return SpanExportResult.SUCCESS


def ended(parent: str | None = None, status: int = 200) -> Trace:
    trace = Trace("a" * 32, parent)
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


def test_about_is_plain() -> None:
    assert json.loads(json.dumps(ended().about))["tier"] == "local"
