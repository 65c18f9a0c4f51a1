"""A result beside an earlier one, or a peer's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from edge_runtime.bench.metrics import METRICS, Metric
from edge_runtime.bench.result import Result
from edge_runtime.errors import ConfigError

NOISE = 0.05
"""Two runs on a quiet machine agree within this, so less is no difference."""
_CONDITIONS = (
    *("model", "device", "weights", "tuned", "url"),
    *("prompt_tokens", "new_tokens", "concurrency", "rate", "nll_tokens"),
)

Verdict = Literal["better", "worse", "equal"]
ARROWS: Mapping[Verdict, str] = {"better": "▲", "worse": "▼", "equal": "≈"}


class Ratio(NamedTuple):
    metric: Metric
    ours: float
    theirs: float

    @property
    def value(self) -> float:
        return self.ours / self.theirs

    @property
    def verdict(self) -> Verdict:
        if abs(self.value - 1) <= NOISE:
            return "equal"
        return "better" if (self.value > 1) == self.metric.higher_is_better else "worse"


class Comparison(NamedTuple):
    name: str
    """The file compared with."""
    ratios: tuple[Ratio, ...]
    differences: tuple[str, ...]
    """Conditions that were not the same, for the reader to judge."""


def read_baseline(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``. ConfigError if it cannot be read or has none of our figures."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ConfigError(f"cannot compare with {path}: {reason}; it must be what --json or --output wrote") from error
    if not isinstance(data, dict) or not any(metric.of(data) for metric in METRICS):
        raise ConfigError(f"cannot compare with {path}: it has no figures such as decode_tps or ttft_ms.p50")
    return data


def compare(result: Result, baseline: Mapping[str, Any], name: str) -> Comparison:
    """Ratios ours / theirs of every figure that both have."""
    ours = msgspec.to_builtins(result)
    pairs = [(metric, metric.of(ours), metric.of(baseline)) for metric in METRICS]
    differences = [
        f"{key}: {_shown(ours[key])} here, {_shown(baseline[key])} there"
        for key in _CONDITIONS
        if key in baseline and baseline[key] != ours[key]
    ]
    theirs_on, ours_on = baseline.get("machine"), ours["machine"]
    if isinstance(theirs_on, Mapping) and theirs_on.get("cpu", ours_on["cpu"]) != ours_on["cpu"]:
        differences.append(f"machine: {ours_on['cpu']} here, {theirs_on['cpu']} there")
    return Comparison(
        name, tuple(Ratio(metric, a, b) for metric, a, b in pairs if a is not None and b), tuple(differences)
    )


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)
