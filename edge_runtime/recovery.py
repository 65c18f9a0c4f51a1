"""What follows when a step has failed, or gave no numbers: whether the device is at fault, or one request's input.

A device that fails at everything is told from a request that makes it fail by a step of one harmless token. The
requests of a failed step are then computed anew from their tokens, one by one; their samplers had drawn nothing for it,
so that the answers are the ones that they would have been.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from devices.base import Decoder, Step
from edge_runtime.completion import Request
from edge_runtime.errors import DeviceError, EdgeError, EngineError, OutOfKVCache, OutOfSequences
from edge_runtime.scheduler import Scheduler

STRIKES = 3
"""Steps that fail, or give no numbers, through nobody's fault that can be named, and the device is at fault."""
SOUND_STEPS = 256
"""After so many steps without another one they are forgotten."""

Forward = Callable[[Sequence[Step]], "list[NDArray[np.float32]]"]


class Recovery:
    """Of one engine; belongs to its thread."""

    def __init__(self, decoder: Decoder, scheduler: Scheduler, forward: Forward) -> None:
        """``forward``: the decoder's, as the engine calls it."""
        self._decoder = decoder
        self._scheduler = scheduler
        self._forward = forward
        self._strikes = 0
        self._sound = 0

    def went_well(self) -> None:
        """A step was run."""
        if self._strikes:
            self._sound += 1
            if self._sound >= SOUND_STEPS:
                self._strikes = 0

    def failed(self, requests: Sequence[Request], cause: Exception) -> EngineError | None:
        """A step of ``requests`` has raised ``cause``; their sequences are undefined.

        None: the device is sound. They are to be run again, each alone, unless it was one that was alone already:
        then it has ended with an error. Otherwise the error of the device.
        """
        error = _of_device(self._decoder.device, cause)
        again = [request for request in requests if self._scheduler.is_apart(request)]
        self._scheduler.set_apart(requests)
        if not self._is_sound():
            return error
        if len(requests) == 1 and again:
            (request,) = again
            self._strikes = max(self._strikes - 1, 0)  # its first failure is explained now
            self._end(
                request, EngineError(f"{self._decoder.device} fails at this request, though not at others: {cause}")
            )
            return None
        return self._strike(error)

    def gave_no_numbers(self, requests: Sequence[Request], cause: EngineError, others: bool) -> EngineError | None:
        """The logits of ``requests`` hold none; ``others``: of the same step some did.

        None: the device is sound, and they have ended with an error. Otherwise the device's.
        """
        error = EngineError(f"{self._decoder.device}: {cause}")
        if not others and (len(requests) > 1 or not self._is_sound()):
            return error
        if (fault := self._strike(error)) is not None:
            return fault
        for request in requests:
            self._end(request, error)
        return None

    def _strike(self, error: EngineError) -> EngineError | None:
        self._strikes, self._sound = self._strikes + 1, 0
        if self._strikes < STRIKES:
            return None
        self._strikes = 0
        return error

    def _end(self, request: Request, error: EdgeError) -> None:
        request.finish("error", error)
        self._scheduler.release(request, keep=False)

    def _is_sound(self) -> bool:
        """Whether the device gives numbers for a token that asks nothing of it."""
        try:
            sequence = self._decoder.new_sequence(1)
        except OutOfSequences:
            return True
        except Exception:  # whatever it is, it fails
            return False
        try:
            (logits,) = self._forward([Step(sequence, np.zeros(1, np.int64), 1)])
        except OutOfKVCache:
            return True
        except Exception:
            return False
        finally:
            with suppress(DeviceError):
                sequence.close()
        return bool(np.isfinite(logits.max()))


def _of_device(device: str, cause: Exception) -> EngineError:
    if isinstance(cause, EngineError):
        return cause
    error = EngineError(f"{device} raised {type(cause).__name__}: {cause}")
    error.__cause__ = cause
    return error
