"""What sequences do alike that have no blocks: know whether they are open, and check lengths."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Generic, Protocol, TypeVar

from devices.base import DecoderLimits
from devices.errors import DeviceError


class SequenceHost(Protocol):
    """The decoder, as its sequences see it."""

    @property
    def limits(self) -> DecoderLimits: ...

    def check_open(self) -> None:
        """DeviceError when the decoder is closed."""

    def forget(self, sequence: Any) -> None:
        """A sequence is closing."""


D = TypeVar("D", bound=SequenceHost)


class BoundSequence(ABC, Generic[D]):
    """The frame of a :class:`devices.base.DecoderSequence`."""

    def __init__(self, decoder: D) -> None:
        self._decoder: D | None = decoder

    @property
    def decoder(self) -> D:
        """DeviceError when the sequence or its decoder is closed."""
        if self._decoder is None:
            raise DeviceError("the sequence is closed; open a new one")
        self._decoder.check_open()
        return self._decoder

    @property
    @abstractmethod
    def length(self) -> int: ...

    @property
    def nbytes(self) -> int:
        return self.length * self.decoder.limits.kv_bytes_per_token

    def close(self) -> None:
        decoder, self._decoder = self._decoder, None
        if decoder is not None:
            decoder.forget(self)

    def _check_length(self, length: int) -> None:
        if not 0 <= length <= self.length:
            raise ValueError(f"length {length} is not within 0..{self.length}, the tokens held")
