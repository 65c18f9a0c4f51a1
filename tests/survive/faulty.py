"""Devices with faults to order, over :class:`tests.fake_decoder.FakeDecoder`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from devices.base import Step
from devices.errors import EngineError
from tests.fake_decoder import FakeDecoder, FakeSequence
from tests.runtime.helpers import Answer, prompt

POISON = 63
"""The token that faults wait for."""


class Throwing:
    """Raises whenever ``when`` says so of a batch, whose sequences are undefined then, as the contract has it."""

    def __init__(
        self,
        when: Callable[[Sequence[Step]], bool],
        error: Callable[[], Exception] = lambda: EngineError("the accelerator fell over"),
    ) -> None:
        self.when = when
        self.error = error
        self.thrown = 0

    def __call__(self, batch: Sequence[Step]) -> None:
        if not self.when(batch):
            return
        self.thrown += 1
        for step in batch:
            assert isinstance(step.sequence, FakeSequence)
            step.sequence.crop(step.sequence.length // 2)
            if step.sequence.decoder.references.count(0):
                step.sequence.append(np.array([5], np.int64))
        raise self.error()


class Nonsense(FakeDecoder):
    """Gives NaN for the sequences that ``when`` says."""

    when: Callable[[FakeSequence], bool] = staticmethod(lambda sequence: False)

    def forward(self, batch: Sequence[Step]) -> list[NDArray[np.float32]]:
        results = super().forward(batch)
        for step, logits in zip(batch, results, strict=True):
            assert isinstance(step.sequence, FakeSequence)
            if self.when(step.sequence):
                logits[:] = np.nan
        return results


class Hanging:
    """Hangs in the first step after :attr:`armed` was set, until it is told to go on."""

    def __init__(self, armed: bool = False) -> None:
        self.armed = threading.Event()
        self.hangs = threading.Event()
        self.go_on = threading.Event()
        if armed:
            self.armed.set()

    def __call__(self, batch: Sequence[Step]) -> None:
        if self.armed.is_set() and not self.hangs.is_set():
            self.hangs.set()
            assert self.go_on.wait(60)


def poisoned(batch: Sequence[Step]) -> bool:
    return any(POISON in step.tokens or holds_poison(step.sequence) for step in batch)


def holds_poison(sequence: object) -> bool:
    assert isinstance(sequence, FakeSequence)
    return POISON in sequence.tokens()


def clean(seed: int, length: int) -> list[int]:
    """A prompt without poison."""
    return [token % POISON for token in prompt(seed, length)]


def silent(decoder: FakeDecoder) -> FakeDecoder:
    """It never says the poisonous token itself."""
    decoder.table[:, POISON] = -100
    return decoder


def error_of(answer: Answer) -> str:
    assert answer.finish_reason == "error"
    assert answer.last is not None
    return str(answer.last.error)
