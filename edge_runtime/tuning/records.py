"""What is tried, and what came of it, as it stands in the tuning log."""

from __future__ import annotations

import secrets
import statistics
from typing import Literal

import msgspec

from devices.base import DecoderOptions
from devices.host import cores
from devices.kv_types import KVType
from edge_runtime.measurements import Shape, Workload
from edge_runtime.package import Weights

Outcome = Literal["won", "lost", "within the noise", "failed", "loses answers", "no time"]


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How to open a model, where that is not the default. None: as the engine chooses."""

    threads: int | None = None
    prefill_chunk: int | None = None
    kv_type: KVType | None = None
    pinning: bool | None = None
    """Threads bound to cores (see :func:`devices.hints.pinning`), which are looked up when the model is opened."""
    properties: dict[str, str] = {}
    """Of :func:`devices.hints.hints`."""

    def words(self) -> list[str]:
        words = []
        if self.threads is not None:
            words.append(f"threads {self.threads}")
        if self.prefill_chunk is not None:
            words.append(f"chunk {self.prefill_chunk}")
        if self.kv_type is not None:
            words.append(f"KV cache {self.kv_type}")
        if self.pinning is not None:
            words.append("threads pinned" if self.pinning else "threads not pinned")
        words += [f"{name}={value}" for name, value in self.properties.items()]
        return words

    def __str__(self) -> str:
        return ", ".join(self.words()) or "default"

    def frugal(self) -> Options:
        """Without what may take more memory than the default."""
        chunk = self.prefill_chunk if (self.prefill_chunk or 0) <= DecoderOptions.prefill_chunk else None
        return msgspec.structs.replace(self, prefill_chunk=chunk, kv_type="int8" if self.kv_type == "int8" else None)


class Setup(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A device, and how the model is opened there."""

    device: str
    """``engine:hardware``."""
    options: Options = Options()

    def __str__(self) -> str:
        return f"{self.device}, {self.options}" if self.options != Options() else self.device


class Figures(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a trial measured."""

    seconds: float
    """Of the machine's time for each request: see :attr:`edge_runtime.measurements.Measurement.seconds`."""
    prefill_tps: float
    decode_tps: float
    nll: float | None = None
    """Mean negative log-likelihood of the bundled text in nats per token, where it was scored."""
    peak_rss_bytes: int | None = None


class Trial(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One process that opened the model and measured it, or failed to."""

    lever: str
    """What the trial was for; ``confirmation`` at the end."""
    setup: Setup
    at_s: float
    """When it began, in seconds of this tuning."""
    took_s: float
    figures: Figures | None = None
    failure: str | None = None


class Verdict(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """On one setup beside another."""

    lever: str
    setup: Setup
    against: Setup
    outcome: Outcome
    gains: tuple[float, ...] = ()
    """Seconds of the other over its own, round by round: above 1 it was faster."""
    low: float | None = None
    high: float | None = None
    """Between which the mean gain is, with 95 % confidence on either side; None with fewer than three rounds."""
    why: str | None = None

    @property
    def gain(self) -> float | None:
        """Geometric mean."""
        return statistics.geometric_mean(self.gains) if self.gains else None


class Run(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """One call of ``tune``."""

    started: str
    """ISO 8601, UTC."""
    machine: str
    """:func:`edge_runtime.machine.fingerprint`."""
    versions: dict[str, str]
    id: str = msgspec.field(default_factory=lambda: secrets.token_hex(8))
    """Of this run alone: two may begin in the same second."""
    load_average: float | None
    """Of the minute before, by others then; None: this platform does not tell."""
    model: str
    variants: dict[str, str]
    """Device → :attr:`edge_runtime.package.Variant.digest` of the variant that it was tried with."""
    weights: Weights
    workload: Workload
    shape: Shape
    memory_budget: str | None = None
    limit_s: float
    default: Setup
    candidate: Setup
    """The best found in the search; not yet confirmed."""
    best: Setup | None = None
    """What to use, confirmed to be no slower than the default; None: undecided, for it was stopped or ran out of time,
    or because what was found before was not found to be wrong."""
    gain: float | None = None
    """Of the best over the default, in the confirming rounds."""
    trials: list[Trial] = []
    verdicts: list[Verdict] = []

    @property
    def busy(self) -> bool:
        """Whether others took so much of the machine that what is best then may not be best when they are gone."""
        return (self.load_average or 0) > cores() / 2

    @property
    def day(self) -> str:
        return self.started[:10]
