"""What profiling gives: the object that ``--json`` prints. Times in milliseconds unless a name says otherwise."""

from __future__ import annotations

import msgspec

from edge_runtime.bench.result import Machine
from edge_runtime.package import Weights


class Spread(msgspec.Struct, frozen=True):
    """Over the requests; percentiles are interpolated linearly."""

    p50: float
    p95: float
    p99: float
    iqr: float
    """Between the quartiles."""


class PartTimes(msgspec.Struct, frozen=True):
    """A part of requests (:attr:`edge_runtime.tracing.trace.Span.name`)."""

    part: str
    ms: Spread
    share: float
    """Of the requests' wall time. Lanes overlap, so that these may make more than 1."""
    critical: float
    """Of the wall time, what of the part was on the critical path: these make 1."""


class PathPart(msgspec.Struct, frozen=True):
    """What one lane did on a critical path, whenever it did it."""

    part: str
    lane: str
    ms: float
    share: float
    """Of the wall time."""
    links: int
    """How many stretches it is made of."""


class CriticalPath(msgspec.Struct, frozen=True):
    """Of one request: what its end had to wait for."""

    request: str
    """Which: ``median`` or ``P95``, by wall time."""
    wall_ms: float
    parts: list[PathPart]
    """Largest first."""


class Limits(msgspec.Struct, frozen=True):
    """What this machine does at most, measured; per second."""

    bytes: float | None
    """Read from memory by all cores. None: too little of it was free to measure that."""
    float_operations: float
    """Products and sums of float32 in registers, with the instructions of our kernels; where there are none here, in a
    product of matrices by numpy."""
    integer_operations: float | None
    """The same of bytes in registers. None: there are no kernels here, and products of integers are held against
    :attr:`float_operations`."""


class OperatorGroup(msgspec.Struct, frozen=True):
    """Operators of one kind and size, as the layers of a network have them."""

    kind: str
    shape: str
    """Of a product: elements of a row in → out; else empty."""
    operators: int
    ms: float
    """In a call of the engine, all of them."""
    share: float
    """Of the time inside the engine."""
    of_bandwidth: float | None
    """Weights, or keys and values, asked for in that time, of what the memory can give: it gave no more of them.
    Well over 1: a processor's cache did. None: not known."""
    of_arithmetic: float | None
    """Operations that the model asks for in that time, of what the processor can do. None: not known."""


class Phase(msgspec.Struct, frozen=True):
    """Calls of the engine of one sort, with operators counted."""

    name: str
    calls: int
    tokens: int
    """Of a call, on average."""
    ms: float
    """Of a call."""
    plain_ms: float | None
    """Of such a step while requests ran, with nothing counted and no other prompt in it; None: there was none."""
    operators_ms: float
    """Of a call, all operators together."""
    groups: list[OperatorGroup]
    """Hottest first."""


class Usage(msgspec.Struct, frozen=True):
    """Of the process, while ``name`` was done. None: this platform does not tell."""

    name: str
    wall_s: float
    cpu_s: float
    other_cpu_s: float
    """Of all other processes of the machine."""
    voluntary_switches: int | None
    """Context switches in which it waited for something."""
    involuntary_switches: int | None
    """Context switches in which others had to have the core."""
    minor_faults: int | None
    """Pages that were in memory already, or new."""
    major_faults: int | None
    """Pages that had to be read from the disk."""


class Memory(msgspec.Struct, frozen=True):
    """What was resident, and what was planned; bytes."""

    samples: list[tuple[float, int]]
    """(seconds since the process began to work, resident)."""
    marks: list[tuple[float, str]]
    """When what began."""
    peak: int
    budget: int | None
    """None: the model is not in this process' memory."""
    asked: bool
    """The budget was given; else it is what would be allowed by what was free."""
    planned: dict[str, int]
    """For this work, by name, in the order in which it is taken; empty: not known."""
    planned_full: int | None
    """The peak if the whole KV cache were used."""


class Result(msgspec.Struct, frozen=True, kw_only=True):
    schema_version: int = 1
    created: str
    model: str
    device: str
    weights: Weights
    tuned: str | None
    prompt_tokens: int
    new_tokens: int
    concurrency: int
    requests: int
    seed: int
    covered: float
    """The share of wall time that spans cover, of the request with least."""
    wall_ms: Spread
    ttft_ms: Spread
    tpot_ms: Spread
    parts: list[PartTimes]
    """In the order in which a request comes by them."""
    critical_paths: list[CriticalPath]
    phases: list[Phase]
    no_operators: str | None
    """Why there are no phases."""
    limits: Limits
    usage: list[Usage]
    memory: Memory
    machine: Machine


class Bar(msgspec.Struct, frozen=True, array_like=True):
    """Of a flame chart; microseconds from its beginning."""

    name: str
    start: float
    length: float


class Row(msgspec.Struct, frozen=True):
    name: str
    bars: list[Bar]


class Chart(msgspec.Struct, frozen=True):
    """A flame chart: rows beneath each other, each within the time of what is above."""

    name: str
    length: float
    rows: list[Row]


class Profile(msgspec.Struct, frozen=True):
    """A result and what only pictures are made of."""

    result: Result
    charts: list[Chart]
