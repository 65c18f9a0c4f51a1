"""A model that is evaluated: opened, and asked for its logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from devices.base import DecoderOptions, Step
from devices.registry import open_decoder
from edge_runtime.placement import Placement
from edge_runtime.store import Store
from edge_runtime.tokenizer import Tokenizer


class Subject:
    """One model on one device. CorruptModel, DeviceUnavailable, EngineError where it does not open."""

    def __init__(self, store: Store, placement: Placement, threads: int | None = None) -> None:
        package, variant = placement.package, placement.variant
        store.verify(package, variant)
        self.placement = placement
        self.tokenizer = Tokenizer.from_folder(package.folder)
        options = DecoderOptions(max_sequences=2, threads=threads, cache_dir=store.home.compiled)
        self._decoder = open_decoder(package.spec(variant), placement.device.name, options)

    @property
    def name(self) -> str:
        package, variant = self.placement.package, self.placement.variant
        return f"{package.name} {variant.name} on {self._decoder.device}"

    @property
    def longest(self) -> int:
        """Tokens of a text that it can look at."""
        limits = self._decoder.limits
        return min(limits.longest, limits.max_prompt)

    @property
    def chunk(self) -> int:
        return self._decoder.limits.prefill_chunk

    @cached_property
    def vocabulary(self) -> Sequence[str | None]:
        return [self.tokenizer.id_to_token(token) for token in range(self.tokenizer.vocab_size)]

    def logits(self, ids: NDArray[np.int64], step: int) -> Iterator[NDArray[np.float32]]:
        """After ``step`` tokens of ``ids`` at a time, (step, vocab); each holds until the next is asked for."""
        sequence = self._decoder.new_sequence(len(ids))
        try:
            for start in range(0, len(ids), step):
                part = ids[start : start + step]
                yield self._decoder.forward([Step(sequence, part, rows=len(part))])[0]
        finally:
            sequence.close()

    def greedy(self, prompt: NDArray[np.int64], count: int) -> list[int]:
        """The ``count`` tokens that it thinks the likeliest, one after the other, whatever they are."""
        sequence = self._decoder.new_sequence(len(prompt) + count)
        answer: list[int] = []
        try:
            for start in range(0, len(prompt), self.chunk):
                rows = self._decoder.forward([Step(sequence, prompt[start : start + self.chunk])])[0]
            while len(answer) < count:
                answer.append(int(rows[-1].argmax()))
                if len(answer) < count:
                    rows = self._decoder.forward([Step(sequence, np.array(answer[-1:], np.int64))])[0]
        finally:
            sequence.close()
        return answer

    def close(self) -> None:
        self._decoder.close()

    def __enter__(self) -> Subject:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
