"""The figures of a result that stand for themselves: their names, units, and which way is better."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

Unit = Literal["tokens/s", "requests/s", "ms", "s", "bytes", "nats"]


class Metric(NamedTuple):
    path: str
    """Where it is in the JSON, with dots."""
    label: str
    unit: Unit

    @property
    def higher_is_better(self) -> bool:
        return self.unit in ("tokens/s", "requests/s")

    def of(self, result: Mapping[str, Any]) -> float | None:
        """Its value; None if it was not measured."""
        value: Any = result
        for name in self.path.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None

    def text(self, value: float) -> str:
        """``value`` for people, with its unit."""
        if self.unit == "bytes":
            return f"{value / 2**20:,.0f} MiB"
        digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 2 if abs(value) >= 1 else 3
        return f"{value:,.{digits}f} {self.unit}"


def _percentiles(name: str, label: str) -> list[Metric]:
    return [Metric(f"{name}.p{level}", f"{label}, P{level}", "ms") for level in (50, 95, 99)]


METRICS: tuple[Metric, ...] = (
    Metric("prefill_tps", "prefill", "tokens/s"),
    Metric("decode_tps", "decode", "tokens/s"),
    Metric("output_tps", "output", "tokens/s"),
    Metric("request_rate", "requests answered", "requests/s"),
    Metric("goodput", "goodput", "requests/s"),
    *_percentiles("ttft_ms", "time to first token"),
    *_percentiles("tpot_ms", "time per output token"),
    *_percentiles("itl_ms", "inter-token latency"),
    Metric("load_s", "load", "s"),
    Metric("start_s", "process start to first token", "s"),
    Metric("peak_rss_bytes", "peak memory", "bytes"),
    Metric("shared_prefix.cold_ttft_ms", "first token, prefix unknown", "ms"),
    Metric("shared_prefix.warm_ttft_ms", "first token, prefix known", "ms"),
    Metric("copying.plain_tps", "copying, plain", "tokens/s"),
    Metric("copying.lookup_tps", "copying, with prompt lookup", "tokens/s"),
    Metric("nll", "loss per token", "nats"),
)
