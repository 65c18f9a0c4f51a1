"""What engines tell of their operators: how long each took, and of products with matrices of weights, how large.

A decoder that was opened with :attr:`devices.base.DecoderOptions.profile` has :class:`Counters`. Engines count for
as long as they run, so that what was counted is told apart by phases, which their user names.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable


class Product(NamedTuple):
    """A matrix of weights by which activations are multiplied."""

    inner: int
    """Elements of a row of activations."""
    outputs: int
    """Elements of a row of the result."""
    weight_bytes: int
    """Codes, scales and zero points, as the file has them."""
    integer: bool
    """They are codes of 8 bits or less, which CPUs multiply as integers."""


class OperatorTime(NamedTuple):
    """An operator of the graph that the engine runs, over the calls of a phase."""

    name: str
    kind: str
    """As the engine calls it."""
    seconds: float
    calls: int
    """In which it ran; of a :attr:`product`, those in which it met rows: in others its weights are not read."""
    product: Product | None = None
    """None: it is none, or the engine does not tell."""
    rows: int = 0
    """Of activations that met :attr:`product`, over all calls."""

    @property
    def attends(self) -> bool:
        return "Attention" in self.kind


class Event(NamedTuple):
    """An operator in one call; seconds from the call's beginning."""

    name: str
    kind: str
    start: float
    seconds: float


class Phase(NamedTuple):
    """What was counted in it."""

    name: str
    calls: int
    """Of the engine."""
    seconds: float
    """Inside these calls, as their caller measured them."""
    operators: tuple[OperatorTime, ...]
    typical_call: tuple[Event, ...]
    """That which took as long as most, its operators in order; empty where the engine tells sums only."""


class Counters(Protocol):
    """Of one open decoder, and of its thread."""

    def begin(self, name: str) -> None:
        """What runs from now on is a phase of this name; what ran before the first is forgotten."""

    def finish(self) -> tuple[Phase, ...]:
        """All phases in which anything ran; nothing is counted any more. Once only. EngineError if the engine does not
        tell."""


@runtime_checkable
class Profiled(Protocol):
    """A decoder that may have counters."""

    @property
    def counters(self) -> Counters | None:
        """None: they were not asked for, or this device has none."""
