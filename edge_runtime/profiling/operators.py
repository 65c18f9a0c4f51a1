"""The hottest operators of an engine: a decoder is opened anew, with its counters on, and does steps like those timed.

Of a product the work is 2 · rows · in · out operations, and its weights are read once in each call in which it meets
rows; of attention it is 4 · heads · head_dim operations for each token and each that it sees, and the keys and values
seen are read once. Activations are taken to stay in the processor's caches. So may weights: bytes are those asked for,
of which the memory itself gave no more.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from devices import profiling
from devices.base import Decoder, DecoderOptions, DecoderSequence, DecoderSpec, Step
from devices.profiling import OperatorTime, Profiled
from devices.registry import open_decoder
from edge_runtime.bench.workload import random_tokens
from edge_runtime.errors import EngineError
from edge_runtime.profiling.result import Limits, OperatorGroup, Phase
from edge_runtime.scratch import scratch_folder

MOST_STEPS = 32
"""Decode steps whose operators are counted."""
WARM_UP_STEPS = 2


class Work(NamedTuple):
    """What the steps of a phase asked for, over all of them and all layers."""

    tokens: int
    attention_operations: int
    attention_bytes: int


class Counted(NamedTuple):
    phase: profiling.Phase
    work: Work


class Shape(NamedTuple):
    """Of the requests."""

    prompt_tokens: int
    new_tokens: int
    concurrency: int
    seed: int


def count(spec: DecoderSpec, device: str, options: DecoderOptions, shape: Shape) -> list[Counted]:
    """Prefill, a prompt after the other in chunks, and decode, all sequences in one step. EngineError, with the reason,
    where this device has no counters or they cannot be read."""
    with scratch_folder("edge-glm-profile-") as folder:
        decoder = open_decoder(spec, device, replace(options, profile=folder))
        try:
            if not isinstance(decoder, Profiled) or decoder.counters is None:
                raise EngineError(f"{device} has no counters that can be read; its engine's own tools may have more")
            counters = decoder.counters
            driver = _Driver(decoder, spec, shape)
            driver.warm_up()
            counters.begin("prefill")
            prefill = driver.prefill()
            counters.begin("decode")
            decode = driver.decode()
            work = {"prefill": prefill, "decode": decode}
            return [Counted(phase, work[phase.name]) for phase in counters.finish()]
        finally:
            decoder.close()


class _Driver:
    """Steps as the scheduler makes them, of random tokens."""

    def __init__(self, decoder: Decoder, spec: DecoderSpec, shape: Shape) -> None:
        self._decoder = decoder
        self._spec = spec
        self._shape = shape
        self._rng = np.random.default_rng((shape.seed, 3))
        self._sequences: list[DecoderSequence] = []
        self._steps = min(shape.new_tokens - 1, MOST_STEPS)  # a prompt gives the first token
        self._expected = shape.prompt_tokens + shape.new_tokens

    def warm_up(self) -> None:
        """Engines pack weights and make code when they first meet a shape."""
        sequences = [self._decoder.new_sequence(self._expected) for _ in range(self._shape.concurrency)]
        for sequence in sequences[:1]:
            list(self._feed(sequence))
        for _ in range(WARM_UP_STEPS):
            self._step(sequences)
        for sequence in sequences:
            sequence.close()

    def prefill(self) -> Work:
        self._sequences = [self._decoder.new_sequence(self._expected) for _ in range(self._shape.concurrency)]
        return self._total([seen for sequence in self._sequences for seen in self._feed(sequence)])

    def decode(self) -> Work:
        return self._total([seen for _ in range(self._steps) for seen in self._step(self._sequences)])

    def _feed(self, sequence: DecoderSequence) -> Iterator[tuple[int, int]]:
        """A prompt; yields (tokens held before, tokens) of each chunk."""
        left, chunk = self._shape.prompt_tokens, self._decoder.limits.prefill_chunk
        while left:
            size, past = min(left, chunk), sequence.length
            left -= size
            self._decoder.forward([Step(sequence, self._tokens(size), rows=int(left == 0))])
            yield past, size

    def _step(self, sequences: Sequence[DecoderSequence]) -> list[tuple[int, int]]:
        pasts = [sequence.length for sequence in sequences]
        self._decoder.forward([Step(sequence, self._tokens(1)) for sequence in sequences])
        return [(past, 1) for past in pasts]

    def _tokens(self, size: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return np.array(random_tokens(self._rng, size, self._spec.vocab_size), np.int64)

    def _total(self, steps: Sequence[tuple[int, int]]) -> Work:
        spec, kv = self._spec, self._decoder.limits.kv_bytes_per_token / self._spec.num_layers
        operations = nbytes = 0
        for window in spec.sliding_windows or (None,) * spec.num_layers:
            for past, size in steps:
                reach = np.arange(past + 1, past + size + 1)
                seen = reach if window is None else np.minimum(reach, window)
                operations += 4 * spec.num_heads * spec.head_dim * int(seen.sum())
                first = 0 if window is None else max(past + 1 - window, 0)  # of what the first of them sees
                nbytes += int((past + size - first) * kv)
        return Work(sum(size for _, size in steps), operations, nbytes)


def phase_of(counted: Counted, limits: Limits, plain_ms: float | None) -> Phase:
    """As it is reported. ``plain_ms``: see :class:`Phase`."""
    phase, work = counted
    return Phase(
        phase.name,
        phase.calls,
        round(work.tokens / phase.calls),
        phase.seconds / phase.calls * 1e3,
        plain_ms,
        sum(each.seconds for each in phase.operators) / phase.calls * 1e3,
        groups(phase, work, limits),
    )


def groups(phase: profiling.Phase, work: Work, limits: Limits) -> list[OperatorGroup]:
    """Hottest first."""
    by_kind: defaultdict[tuple[str, tuple[int, int, bool] | None], list[OperatorTime]] = defaultdict(list)
    for each in phase.operators:
        size = None if each.product is None else (each.product.inner, each.product.outputs, each.product.integer)
        by_kind[each.kind, size].append(each)
    found = []
    for (kind, size), operators in by_kind.items():
        seconds = sum(each.seconds for each in operators)
        nbytes, operations, rate = _asked(operators, work, limits)
        found.append(
            OperatorGroup(
                kind=kind,
                shape="" if size is None else f"{size[0]} → {size[1]}",
                operators=len(operators),
                ms=seconds / phase.calls * 1e3,
                share=seconds / phase.seconds,
                of_bandwidth=nbytes / seconds / limits.bytes if nbytes and seconds and limits.bytes else None,
                of_arithmetic=operations / seconds / rate if operations and seconds else None,
            )
        )
    return sorted(found, key=lambda each: -each.ms)


def _asked(operators: Sequence[OperatorTime], work: Work, limits: Limits) -> tuple[int, int, float]:
    """Bytes and operations, and how many of them a second can have; 0 where that is not known."""
    if operators[0].attends:
        return work.attention_bytes, work.attention_operations, limits.float_operations
    products = [(each, each.product) for each in operators if each.product is not None]
    nbytes = sum(each.calls * product.weight_bytes for each, product in products)
    operations = sum(2 * each.rows * product.inner * product.outputs for each, product in products)
    integer = any(product.integer for _, product in products) and limits.integer_operations is not None
    return nbytes, operations, limits.integer_operations or 0.0 if integer else limits.float_operations
