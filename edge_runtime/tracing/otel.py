"""Traces as OpenTelemetry has them, sent by OTLP over HTTP: ``edge-glm serve --otel``, with ``edge-glm[otel]``.

Where to is what OpenTelemetry's own variables say (``OTEL_EXPORTER_OTLP_ENDPOINT`` and so on; else this machine). Names
follow its semantic conventions for generative AI; nothing of what was asked or answered is sent. Of what is done for
each token there is one span, with how often and how long.
"""

from __future__ import annotations

import importlib.util
import threading
from collections import defaultdict
from typing import TYPE_CHECKING

from edge_runtime.errors import ConfigError
from edge_runtime.tracing.trace import Span, Trace
from edge_runtime.version import version

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

NEEDED = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http.trace_exporter")
CLOSE_S = 2.0
"""A collector that does not answer is tried again for longer."""
_CONVENTIONS = {
    "path": "http.route",
    "status": "http.response.status_code",
    "model": "gen_ai.request.model",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "completion_tokens": "gen_ai.usage.output_tokens",
}
"""Name here → name there; others are put under ``edge_glm.``."""


class OtelSink:
    """A sink of :class:`~edge_runtime.tracing.recorder.Recorder`: queues, and sends from a thread of its own."""

    def __init__(self, exporter: SpanExporter | None = None) -> None:
        """``exporter``: in place of OTLP's. ConfigError if OpenTelemetry is not installed."""
        if not all(_found(name) for name in NEEDED):
            raise ConfigError("OpenTelemetry is not installed; run: pip install 'edge-glm[otel]'")
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.id_generator import RandomIdGenerator

        class OurIds(RandomIdGenerator):
            """A trace's own id, where it has no parent."""

            trace_id = 0

            def generate_trace_id(self) -> int:
                return self.trace_id

        resource = Resource.create({SERVICE_NAME: "edge-glm", SERVICE_VERSION: version()})
        self._ids = OurIds()
        self._naming = threading.Lock()
        self._provider = TracerProvider(resource=resource, id_generator=self._ids, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("edge_glm", version())

    def __call__(self, trace: Trace) -> None:
        from opentelemetry.context import Context
        from opentelemetry.trace import (
            NonRecordingSpan,
            SpanContext,
            SpanKind,
            Status,
            StatusCode,
            TraceFlags,
            set_span_in_context,
        )

        above = Context()
        if trace.parent is not None:
            flags = TraceFlags(TraceFlags.SAMPLED if trace.sampled else TraceFlags.DEFAULT)
            caller = SpanContext(int(trace.id, 16), int(trace.parent, 16), is_remote=True, trace_flags=flags)
            above = set_span_in_context(NonRecordingSpan(caller), above)
        offset = trace.unix_ns - trace.started
        about = {_CONVENTIONS.get(key, f"edge_glm.{key}"): value for key, value in trace.about.items()}
        name = str(trace.about.get("path", "request"))
        with self._naming:
            self._ids.trace_id = int(trace.id, 16)
            root = self._tracer.start_span(name, above, SpanKind.SERVER, about, start_time=trace.unix_ns)
        if not root.is_recording():  # as the caller wants it, or OTEL_TRACES_SAMPLER
            return
        inside = set_span_in_context(root, Context())
        for (lane, part), spans in _grouped(trace).items():
            busy = sum(span.end - span.start for span in spans)
            told: dict[str, str | int | float] = {
                "edge_glm.lane": lane,
                "edge_glm.count": len(spans),
                "edge_glm.busy_ms": busy / 1e6,
            }
            child = self._tracer.start_span(
                part, inside, attributes=told, start_time=min(span.start for span in spans) + offset
            )
            child.end(max(span.end for span in spans) + offset)
        if int(trace.about.get("status", 200)) >= 500:
            root.set_status(Status(StatusCode.ERROR))
        root.end(trace.unix_ns + trace.wall)

    def close(self) -> None:
        """Send what is left, if that takes no longer than :data:`CLOSE_S`."""
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(CLOSE_S)


def _grouped(trace: Trace) -> dict[tuple[str, str], list[Span]]:
    groups: defaultdict[tuple[str, str], list[Span]] = defaultdict(list)
    for span in trace:
        groups[span.lane, span.part].append(span)
    return groups


def _found(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


__all__ = ["OtelSink"]
