"""What decoders do alike whatever their sequences are made of: say what they are, count their sequences, close."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from devices.base import DecoderLimits, DecoderSequence, Step
from devices.errors import DeviceError, OutOfSequences
from devices.profiling import Counters
from devices.stopwatch import Stopwatch

S = TypeVar("S", bound=DecoderSequence)


class SequenceDecoder(ABC, Generic[S]):
    """The frame of a :class:`devices.base.Decoder`: an open device and the open sequences on it."""

    def __init__(self, device: str, limits: DecoderLimits) -> None:
        """``device``: ``engine:hardware`` as really opened."""
        self._device = device
        self._limits = limits
        self._open = True
        self._sequences: set[S] = set()
        self._stopwatch = Stopwatch()
        self.counters: Counters | None = None
        """See :class:`devices.profiling.Profiled`."""

    @property
    def limits(self) -> DecoderLimits:
        return self._limits

    @property
    def device(self) -> str:
        return self._device

    @property
    def engine_seconds(self) -> float:
        return self._stopwatch.seconds

    def check_open(self) -> None:
        """DeviceError when the decoder is closed."""
        if not self._open:
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
        if self._open:
            self._open = False
            self._sequences.clear()
            self.counters = None
            self._release()

    @abstractmethod
    def _release(self) -> None:
        """Free the model and the KV cache; called once."""
