"""GET /metrics, in Prometheus's format: what is asked, how long it takes, and what the models hold.

Names and buckets follow vLLM's and the Prometheus conventions (seconds, bytes, ``_total``), so that dashboards need
little change.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edge_runtime.engine_stats import EngineStats
from edge_runtime.request import Chunk, Usage
from edge_runtime.server.errors import CLIENT_LEFT
from edge_runtime.server.served import ServedModel

disable_created_metrics()  # type: ignore[no-untyped-call]  # when each series began: twice as many lines, and nobody asks
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Meter:
    """What one application has seen. Of one event loop."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        with suppress(Exception):  # not on every platform
            ProcessCollector(registry=registry)
        model = ["model"]
        self.requests = Counter(
            "edge_glm_http_requests", "Requests answered.", ["path", "method", "status"], registry=registry
        )
        self.in_flight = 0
        self.generations = Counter(
            "edge_glm_generations",
            "Generations that ended, by where they were made and how they ended.",
            [*model, "tier", "outcome"],
            registry=registry,
        )
        self.first_token = Histogram(
            "edge_glm_time_to_first_token_seconds", "From a request to its first token.", model, buckets=_SECONDS,
            registry=registry,
        )  # fmt: skip
        self.per_token = Histogram(
            "edge_glm_time_per_output_token_seconds", "Of a generation, after its first token: the mean.", model,
            buckets=_PER_TOKEN, registry=registry,
        )  # fmt: skip
        self.seconds = Histogram(
            "edge_glm_generation_seconds", "From a request to its last token.", model, buckets=_SECONDS,
            registry=registry,
        )  # fmt: skip
        self.tokens = Counter(
            "edge_glm_tokens", "Tokens of prompts (computed, or known already) and of answers.", [*model, "kind"],
            registry=registry,
        )  # fmt: skip

        self._objectives = Counter(
            "edge_glm_latency_objectives",
            "Requests of classes that want a latency: met, or why not.",
            ["task_class", "outcome"],
            registry=registry,
        )

    def objective(self, task: str, outcome: str) -> None:
        """See :class:`edge_runtime.tracing.objectives.Objectives`."""
        self._objectives.labels(task, outcome).inc()

    def serve(self, models: Callable[[], Iterable[tuple[str, ServedModel]]], budget: int | None = None) -> None:
        """Tell of these, too: those that are open when somebody asks. ``budget``: bytes of memory."""
        if budget is not None:
            Gauge("edge_glm_memory_budget_bytes", "What the process may take.", registry=self._registry).set(budget)
        self._registry.register(_Engines(models, self))

    def page(self) -> bytes:
        return bytes(generate_latest(self._registry))

    def watch(self, model: str) -> Watched:
        return Watched(self, model)


class Watched:
    """Times the generations of one request."""

    def __init__(self, meter: Meter, model: str) -> None:
        self._meter = meter
        self.model = model
        self._started = time.perf_counter()
        self._first: dict[tuple[int, int], float] = {}
        self._counts: dict[tuple[int, int], int] = {}
        self._ended: set[tuple[int, int]] = set()
        self._open = True

    def chunk(self, number: int, chunk: Chunk) -> None:
        """Of the generation ``number``."""
        key, now, model = (number, chunk.index), time.perf_counter(), self.model
        said = len(chunk.token_ids) or bool(chunk.text or chunk.extra)  # a tier elsewhere tells no tokens
        if key not in self._first and said:
            self._first[key] = now
            self._meter.first_token.labels(model).observe(now - self._started)
        self._counts[key] = self._counts.get(key, 0) + said
        if chunk.finish_reason is None:
            return
        self._ended.add(key)
        self._meter.generations.labels(model, chunk.tier, chunk.finish_reason).inc()
        self._meter.seconds.labels(model).observe(now - self._started)
        if self._counts[key] > 1:
            self._meter.per_token.labels(model).observe((now - self._first[key]) / (self._counts[key] - 1))

    @property
    def first_at(self) -> float | None:
        """When the first token came, by :func:`time.perf_counter`."""
        return min(self._first.values(), default=None)

    def end(self, usage: Usage, generations: int) -> None:
        """Once; ``generations``: so many were begun. Of those that have not come to an end of their own, one of which
        nothing has come counts as one completion."""
        if not self._open:
            return
        self._open = False
        tokens = self._meter.tokens
        tokens.labels(self.model, "prompt").inc(usage.prompt_tokens - usage.cached_tokens)
        tokens.labels(self.model, "prompt_cached").inc(usage.cached_tokens)
        tokens.labels(self.model, "completion").inc(usage.completion_tokens)
        cut = len(self._counts.keys() - self._ended) + generations - len({number for number, _ in self._counts})
        if cut:
            self._meter.generations.labels(self.model, "", "cancelled").inc(cut)


class Counting:
    """Middleware: counts requests by path and status."""

    def __init__(self, app: ASGIApp, meter: Meter) -> None:
        self._app = app
        self._meter = meter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent: int | None = None
        unsent = CLIENT_LEFT

        async def count(message: Message) -> None:
            nonlocal sent
            if message["type"] == "http.response.start":
                sent = message["status"]
            await send(message)

        self._meter.in_flight += 1
        try:
            await self._app(scope, receive, count)
        except BaseException:
            unsent = 500  # by who stands outside
            raise
        finally:
            self._meter.in_flight -= 1
            # the route's pattern: paths that anybody makes up must not each be a series
            route = scope.get("route")
            path = getattr(route, "path", None) or "other"
            method = scope["method"] if scope["method"] in ("GET", "POST", "DELETE", "OPTIONS", "HEAD") else "other"
            self._meter.requests.labels(path, method, str(unsent if sent is None else sent)).inc()


class _Engines(Collector):
    """Read when somebody asks."""

    def __init__(self, models: Callable[[], Iterable[tuple[str, ServedModel]]], meter: Meter) -> None:
        self._models = models
        self._meter = meter

    def collect(self) -> Iterable[Metric]:
        flight = GaugeMetricFamily("edge_glm_http_requests_in_flight", "Requests that are being answered.")
        flight.add_metric([], self._meter.in_flight)
        yield flight
        known = [(name, model, model.stats) for name, model in self._models() if model.ready]
        info = InfoMetricFamily("edge_glm_model", "What a model runs on.", labels=["model"])
        for name, model, _ in known:
            info.add_metric([name], {key: str(value) for key, value in model.placement.items()})
        yield info
        for gauge in _gauges():
            for name, model, stats in known:
                gauge.metric.add_metric([name], gauge.value(model, stats))
            yield gauge.metric


class _Gauge:
    def __init__(self, metric: GaugeMetricFamily | CounterMetricFamily, field: str) -> None:
        self.metric = metric
        self._field = field

    def value(self, model: ServedModel, stats: EngineStats) -> float:
        return float(model.kv_tokens if self._field == "kv_tokens" else getattr(stats, self._field))


def _gauges() -> Iterator[_Gauge]:
    for name, field, words in (
        ("requests_running", "running", "Completions that are being made."),
        ("requests_waiting", "waiting", "Requests in the queue."),
        ("kv_cache_tokens", "kv_tokens", "Tokens of KV cache that there are."),
        ("kv_cache_running_tokens", "running_tokens", "Tokens of KV cache that running completions hold."),
        ("prefix_cache_tokens", "cached_tokens", "Tokens of KV cache kept for prompts that begin alike."),
        ("prefix_cache_sequences", "cached_sequences", "Sequences kept for that."),
    ):
        yield _Gauge(GaugeMetricFamily(f"edge_glm_{name}", words, labels=["model"]), field)
    for name, field, words in (
        ("preemptions", "preemptions", "Completions that were put back to make room."),
        ("drafted_tokens", "drafted_tokens", "Tokens that were drafted."),
        ("accepted_tokens", "accepted_tokens", "Of them, those that held."),
        ("forward_seconds", "forward_seconds", "Time in the device layer."),
        ("inference_seconds", "inference_seconds", "Of it, time in the inference engine."),
    ):
        yield _Gauge(CounterMetricFamily(f"edge_glm_{name}", words, labels=["model"]), field)


async def metrics(request: Request) -> Response:
    meter: Meter = request.app.state.context.meter
    return Response(meter.page(), media_type=CONTENT_TYPE_LATEST)
