"""What a measurement gives: the object that ``--json`` prints and ``--compare`` reads."""

from __future__ import annotations

import msgspec

from edge_runtime.package import Weights
from edge_runtime.timing.observations import TimedRun


class Percentiles(msgspec.Struct, frozen=True):
    p50: float
    p95: float
    p99: float


class Shares(msgspec.Struct, frozen=True):
    """Where a token's time goes while decoding; fractions that make 1."""

    inference: float
    """Inside the inference engine's calls."""
    device: float
    """In the device layer around them."""
    runtime: float
    """The rest: scheduling, sampling, text, and handing over to the reader."""


class SharedPrefix(msgspec.Struct, frozen=True):
    """Time to first token of a prompt whose first ``tokens`` are known already, against one of the same length."""

    tokens: int
    cached_tokens: int
    """Tokens of the prefix that were not computed again."""
    cold_ttft_ms: float
    warm_ttft_ms: float
    speedup: float
    """Cold over warm, median of the pairs."""


class Copying(msgspec.Struct, frozen=True):
    """Answers that repeat their prompt, at temperature 0: plain decoding against prompt lookup."""

    tasks: int
    identical: int
    """Of the tasks, those with the same tokens both ways."""
    plain_tps: float
    lookup_tps: float
    """Tokens per second of one stream, median of the tasks."""
    speedup: float
    """Lookup over plain, median of the tasks."""
    accepted: float
    """Share of the drafted tokens that held."""


class Samples(msgspec.Struct, frozen=True):
    """What the percentiles are of, for plots."""

    ttft_ms: list[float]
    tpot_ms: list[float]
    itl_by_place_ms: list[tuple[int, float]]
    """(place in the answer, median over the streams there)."""


class Machine(msgspec.Struct, frozen=True):
    """None: this platform does not tell."""

    cpu: str
    cores: int
    """Logical cores that this process may use."""
    memory_bytes: int | None
    os: str
    python: str
    load_average: float | None
    """Of the minute before: processes that wanted to run. A quiet machine is near 0."""
    versions: dict[str, str]


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement. None: not part of it, or not known on this platform."""

    schema_version: int = 1
    created: str
    model: str
    device: str | None = None
    """``engine:device``; None for a server."""
    weights: Weights | None = None
    tuned: str | None = None
    """What was taken of that which ``edge-glm tune`` found."""
    url: str | None = None
    prompt_tokens: int
    new_tokens: int
    concurrency: int
    """Streams that run at once; with ``rate``, the most that did."""
    requests: int
    """Streams that were measured."""
    seed: int

    prefill_tps: float | None = None
    """Prompt tokens per second, until all streams of a round have their first token; median of the rounds."""
    decode_tps: float | None = None
    """Tokens per second of all streams together while all of them decode; median of the rounds."""
    ttft_ms: Percentiles | None
    """Time to first token, over the streams."""
    tpot_ms: Percentiles | None
    """Time per output token: of each stream the mean, over the streams. None if every answer came in one piece."""
    itl_ms: Percentiles | None
    """Inter-token latency, over all tokens."""

    load_s: float | None = None
    """Opening the model."""
    start_s: float | None = None
    """From the start of the process to the first token after a short prompt."""
    peak_rss_bytes: int | None = None
    """Of the process that runs the model."""
    shares: Shares | None = None
    shared_prefix: SharedPrefix | None = None
    copying: Copying | None = None
    timed: TimedRun | None = None
    """Single requests, for the timing model."""
    untimed: str | None = None
    """Why they could not be timed."""
    nll: float | None = None
    """Mean negative log-likelihood of the bundled text in nats per token."""
    nll_tokens: int | None = None

    rate: float | None = None
    """Requests per second that were sent."""
    request_rate: float | None = None
    """Requests per second that were answered."""
    output_tps: float | None = None
    """Tokens of answers per second, from the first request to the last answer."""
    goodput: float | None = None
    """Requests per second that were answered within the limits asked for."""
    errors: dict[str, int] | None = None
    """HTTP status, ``connection`` or ``stream`` → requests that failed so."""

    samples: Samples
    machine: Machine
