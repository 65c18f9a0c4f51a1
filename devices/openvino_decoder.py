"""What both OpenVINO decoders do alike: say what they are, count their sequences, close."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

from devices.base import DecoderLimits, DecoderSequence, Step
from devices.errors import DeviceError, OutOfSequences
from devices.openvino_graph import engine_errors
from devices.stopwatch import Stopwatch

S = TypeVar("S", bound=DecoderSequence)


class CompiledDecoder(Generic[S]):
    """A compiled model on OpenVINO's ``device``, and the open sequences of it. Its subclasses set the limits."""

    _limits: DecoderLimits

    def __init__(self, compiled: Any, device: str) -> None:
        self._compiled = compiled
        self._device = device
        self._sequences: set[S] = set()
        self._stopwatch = Stopwatch()

    @property
    def limits(self) -> DecoderLimits:
        return self._limits

    @property
    def device(self) -> str:
        return f"openvino:{self._device.lower()}"

    @property
    def engine_seconds(self) -> float:
        return self._stopwatch.seconds

    def check_open(self) -> None:
        """DeviceError when the decoder is closed."""
        if self._compiled is None:
            raise DeviceError("the decoder is closed; open the device again")

    def _check_place(self) -> None:
        self.check_open()
        if len(self._sequences) >= self._limits.max_sequences:
            raise OutOfSequences(
                f"{self._limits.max_sequences} sequences are open, as many as max_sequences allows; close one"
            )

    def _starts_on_long(self, expected: int) -> bool:
        """Whether a sequence of ``expected`` tokens needs the long rotary factors from its start."""
        switch = self._limits.rope_switch
        return switch is not None and expected > switch

    def _own(self, step: Step) -> S:
        if step.sequence not in self._sequences:
            raise ValueError("the sequence is not an open sequence of this decoder")
        return step.sequence

    def close(self) -> None:
        if self._compiled is None:
            return
        compiled, self._compiled = self._compiled, None
        self._sequences.clear()
        with engine_errors("releasing memory"):
            compiled.release_memory()
