"""What follows when a step has failed, or gave no numbers: whether the device is at fault, or one request's input.

A device that fails at everything is told from a request that makes it fail by a step of one harmless token. The
requests of a failed step are then computed anew from their tokens, one by one; their samplers had drawn nothing for it,
so that the answers are the ones that they would have been.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

import numpy as np

from devices.base import Decoder, Forward, Step
from edge_runtime.completion import Request
from edge_runtime.errors import DeviceError, EdgeError, EngineError, OutOfKVCache, OutOfSequences
from edge_runtime.handover import HandOver, Successor
from edge_runtime.scheduler import Scheduler

STRIKES = 3
"""Steps that fail, or give no numbers, through nobody's fault that can be named, and the device is at fault."""
SOUND_STEPS = 256
"""After so many steps without another one they are forgotten."""


class Recovery:
    """Of one engine; belongs to its thread."""

    def __init__(self, decoder: Decoder, scheduler: Scheduler, forward: Forward, successor: Successor) -> None:
        """``forward``: the decoder's, as the engine calls it."""
        self._decoder = decoder
        self._scheduler = scheduler
        self._forward = forward
        self._successor = successor
        self._strikes = 0
        self._sound = 0

    def went_well(self) -> None:
        """A step was run."""
        if self._strikes:
            self._sound += 1
            if self._sound >= SOUND_STEPS:
                self._strikes = 0

    def failed(self, requests: Sequence[Request], cause: Exception) -> None:
        """A step of ``requests`` has raised ``cause``; their sequences are undefined. They are to be run again, each
        alone, unless it was one that was alone already: then it ends with an error. HandOver: the device is at fault.
        """
        requests, error = list(requests), _of_device(self._decoder.device, cause)
        again = len(requests) == 1 and self._scheduler.is_apart(requests[0])
        self._scheduler.set_apart(requests)
        if not self._is_sound():
            self._put_aside(requests, error)
        elif again:
            self._strikes = max(self._strikes - 1, 0)  # its first failure is explained now
            words = f"{self._decoder.device} fails at this request, though not at others: {cause}"
            self._end(requests, EngineError(words))
        elif self._strike():
            self._put_aside(requests, error)

    def gave_no_numbers(self, broken: Mapping[Request, EngineError], requests: Sequence[Request]) -> None:
        """In a step that gave ``requests`` their logits, some of these were no numbers; what is wrong with whose. Those
        end with an error. HandOver: the device is at fault."""
        error = EngineError(f"{self._decoder.device}: {next(iter(broken.values()))}")
        others = any(each not in broken for each in requests)
        if (not others and (len(broken) > 1 or not self._is_sound())) or self._strike():
            self._put_aside(list(broken), error)
        else:
            self._end(list(broken), error)

    def _put_aside(self, requests: Sequence[Request], fault: EngineError) -> None:
        """The device, if another can take over; else ``requests``, whose step it was, end."""
        if (open_successor := self._successor(fault)) is not None:
            raise HandOver(f"{self._decoder.device} failed ({fault})", open_successor, fault) from fault
        self._end(requests, fault)

    def _strike(self) -> bool:
        """Whether it was one too many."""
        self._strikes, self._sound = self._strikes + 1, 0
        if self._strikes < STRIKES:
            return False
        self._strikes = 0
        return True

    def _end(self, requests: Sequence[Request], error: EdgeError) -> None:
        for request in requests:
            request.finish("error", error)
            self._scheduler.release(request, keep=False)

    def _is_sound(self) -> bool:
        """Whether the device gives numbers for a token that asks nothing of it."""
        while True:
            try:
                return self._runs_a_token()
            except (OutOfSequences, OutOfKVCache):
                if not self._scheduler.give_way():
                    return True  # it counts, at least
            except Exception:  # whatever it is, it fails
                return False

    def _runs_a_token(self) -> bool:
        sequence = self._decoder.new_sequence(1)
        try:
            (logits,) = self._forward([Step(sequence, np.zeros(1, np.int64), 1)])
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
