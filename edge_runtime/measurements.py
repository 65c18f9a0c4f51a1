"""What ``edge-glm bench`` measured on this machine, kept so that ``auto`` picks a device by it.

One file in the cache. A measurement speaks for its model, weight format and shape, and only as long as the processor
and the versions of the engines are those it was made with.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

import msgspec

from edge_runtime.package import Weights
from edge_runtime.record_file import RecordFile

Workload = Literal["one", "many", "long"]
"""``one``: a stream at a time; ``many``: streams at once; ``long``: long prompts with short answers."""
WORKLOADS: tuple[Workload, ...] = get_args(Workload)
LONG = 16
"""Prompt tokens for each new one from which a workload is called long."""
_KEPT = 500
_log = logging.getLogger("edge_glm.measurements")


class Shape(msgspec.Struct, frozen=True):
    """Of the requests that were measured."""

    prompt_tokens: int
    new_tokens: int
    concurrency: int

    @property
    def workload(self) -> Workload:
        if self.concurrency > 1:
            return "many"
        return "long" if self.prompt_tokens >= LONG * self.new_tokens else "one"


class Measurement(msgspec.Struct, frozen=True):
    model: str
    device: str
    """``engine:hardware``."""
    weights: Weights
    shape: Shape
    seconds: float
    """Of the machine's time for each request: prefill and decoding at the rates of all streams together."""
    machine: str
    """Processor, cores and versions, in words; measurements of others do not count."""
    loss: float | None = None
    """Nats per token of the bundled text, if it was scored."""


class Measurements:
    """The file. Reading never fails: what is broken counts as nothing measured, and is said in the log."""

    def __init__(self, file: Path, machine: str) -> None:
        self._records = RecordFile(file, Measurement, _KEPT, _log, "bench again to replace it", bare=True)
        self._machine = machine

    def read(self) -> list[Measurement]:
        """Of this machine as it is, oldest first."""
        return [each for each in self._records.read() if each.machine == self._machine and each.seconds > 0]

    def keep(self, measurement: Measurement) -> None:
        """In place of an earlier one of the same kind. StorageError as :meth:`RecordFile.change`."""
        kind = _kind(measurement)

        def changed(before: list[Measurement]) -> list[Measurement]:
            kept = measurement
            if kept.loss is None:  # it is not the shape's, and need not be scored each time
                known = (each.loss for each in reversed(before) if _kind(each) == kind)
                kept = msgspec.structs.replace(kept, loss=next(known, None))
            return [*(each for each in before if _kind(each) != kind), kept]

        self._records.change(changed)

    def losses(self, model: str) -> Mapping[Weights, float]:
        """Weights → the latest loss of ``model`` that was measured with them, on whatever device."""
        return {each.weights: each.loss for each in self.read() if each.model == model and each.loss is not None}

    def order(self, devices: Sequence[str], model: str, weights: str | None, workload: Workload) -> list[str]:
        """``devices``, of which the measured ones change places so that the fastest is first.

        Only measurements of one shape are compared: that of the workload which was measured on most devices, the
        latest of several. A device that was not measured keeps its place.
        """
        times = self.compared(devices, model, weights, workload)
        ranked = iter(sorted(times, key=lambda device: times[device]))
        return [next(ranked) if device in times else device for device in devices]

    def compared(
        self, devices: Sequence[str], model: str, weights: str | None, workload: Workload
    ) -> Mapping[str, float]:
        """Those of ``devices`` of which :meth:`order` goes by what was measured, and their seconds for a request."""
        by_shape: dict[Shape, dict[str, float]] = {}
        for each in self.read():
            if each.model == model and weights in (None, each.weights) and each.shape.workload == workload:
                times = by_shape.pop(each.shape, {})  # to the end: the latest
                if each.device in devices:
                    times[each.device] = min(each.seconds, times.get(each.device, each.seconds))
                by_shape[each.shape] = times
        return max(reversed(by_shape.values()), key=len, default={})


def _kind(measurement: Measurement) -> tuple[object, ...]:
    return measurement.machine, measurement.model, measurement.device, measurement.weights, measurement.shape
