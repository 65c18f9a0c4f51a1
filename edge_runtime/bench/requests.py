"""What the timing model is fitted to: single requests of a few lengths, alone and beside others, timed as a caller sees
them. To measure more of them, add to :func:`shapes`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import NamedTuple

import numpy as np

from devices.base import DecoderLimits
from edge_runtime.bench.local import MeasuredLLM
from edge_runtime.bench.workload import random_tokens
from edge_runtime.errors import EdgeError
from edge_runtime.generation import Generation
from edge_runtime.timing.observations import EachToken, FirstToken, Observation, merged

PREFILL_S = 9.0
"""About so long the prompts of one round may take to be run."""
LONGEST, SHORTEST = 2048, 256
"""Bounds of the longest prompt."""
NEW_TOKENS = 12
"""Of each answer, as far as it is timed."""
_LENGTHS = (1.0, 0.04, 0.5, 0.1, 0.3, 0.18)
"""Prompts, as shares of the longest."""
_CACHED = ((0.5, 0.4), (0.3, 0.15))
"""Prompts and what is known of them already, as shares of the longest."""
_BATCHES = ((2, 0.3, 0.15), (4, 0.12, 0.04), (8, 0.05, 0.1), (16, 0.03, 0.0))
"""Sequences that decode together, the prompt of each, and one that comes while they do, if any."""
_ROUND = 6.5
"""Prompt tokens of one round, in longest prompts: what the shares above make together, and a margin."""
_ROUNDS = 3
_LOOK_S = 0.002
"""Between two looks at what runs."""


class Shapes(NamedTuple):
    """Of one round, in tokens."""

    alone: tuple[int, ...]
    cached: tuple[tuple[int, int], ...]
    """(prompt, tokens of it that are known)."""
    batches: tuple[tuple[int, int, int], ...]
    """(sequences, prompt of each, a prompt that comes while they decode)."""


def shapes(limits: DecoderLimits, prefill_tps: float) -> Shapes:
    """As long as the device takes, and a round of as many seconds as :data:`PREFILL_S` says at ``prefill_tps`` tokens
    a second."""
    room = min(limits.longest, limits.kv_tokens) - 4 * NEW_TOKENS
    longest = min(limits.max_prompt, room, max(min(int(prefill_tps * PREFILL_S / _ROUND), LONGEST), SHORTEST))

    def part(share: float) -> int:
        return max(round(share * longest), 2)

    batches = [(count, part(share), part(probe)) for count, share, probe in _BATCHES if count <= limits.max_sequences]
    taken = [
        (count, length, probe)
        for count, length, probe in batches
        if count * (length + 4 * NEW_TOKENS) + probe <= limits.kv_tokens
    ]
    cached = [(part(whole), part(known)) for whole, known in _CACHED]
    return Shapes(tuple(map(part, _LENGTHS)), tuple(cached), tuple(taken))


def observe(llm: MeasuredLLM, prefill_tps: float, limit_s: float, seed: int = 0) -> list[Observation]:
    """The median of as many rounds, up to :data:`_ROUNDS`, as fit ``limit_s``; one at least. The prefix cache must be
    on."""
    rng = np.random.default_rng((seed, 3))
    planned = shapes(llm.limits, prefill_tps)
    timer = Timer(llm, rng)
    timer.alone(planned.alone[0])  # engines make their kernels, and give buffers their size, when they are first asked
    if planned.batches:
        timer.beside(*planned.batches[-1])
    rounds: list[list[Observation]] = []
    started = time.perf_counter()
    while len(rounds) < _ROUNDS:
        took = time.perf_counter() - started
        if rounds and took * (len(rounds) + 1) / len(rounds) > limit_s:
            break
        rounds.append(_round(timer, planned))
    return merged(rounds)


def _round(timer: Timer, planned: Shapes) -> list[Observation]:
    found: list[Observation] = []
    for length in planned.alone:
        found += timer.alone(length)
    for whole, known in planned.cached:
        found += timer.cached(whole, known)
    for batch in planned.batches:
        found += timer.beside(*batch)
    return found


class Timer:
    """Times requests of random tokens, whose answers are always the same word."""

    def __init__(self, llm: MeasuredLLM, rng: np.random.Generator) -> None:
        self._llm = llm
        self._rng = rng
        self._params = llm.same_word(NEW_TOKENS)
        self._long = llm.same_word()

    def prompt(self, length: int) -> list[int]:
        return random_tokens(self._rng, length, self._llm.vocab_size)

    def alone(self, length: int, known: Sequence[int] = ()) -> list[Observation]:
        """A prompt of so many tokens, beginning with ``known``, while nothing else runs."""
        prompt = [*known, *self.prompt(length - len(known))]
        arrivals: list[float] = []
        submitted = time.perf_counter()
        with self._llm.start_completion(prompt, self._params) as generation:
            _read(generation, arrivals)  # to its end: one that is cancelled would take another step beside what comes
            cached = generation.usage.cached_tokens
        between = (arrivals[-1] - arrivals[0]) / (NEW_TOKENS - 1)
        return [
            FirstToken(prompt=length, cached=cached, seconds=arrivals[0] - submitted),
            EachToken(held=length + NEW_TOKENS // 2, seconds=between),
        ]

    def cached(self, length: int, known: int) -> list[Observation]:
        """A prompt whose first ``known`` tokens another had before."""
        before = self.prompt(length)
        self.alone(length, before)
        return self.alone(length, before[:known])

    def beside(self, count: int, length: int, probe: int) -> list[Observation]:
        """``count`` prompts at once: their time per token once all of them decode, and then the first token of one more
        prompt of ``probe`` tokens, where there is a place for it."""
        llm = self._llm
        generations = [llm.start_completion(self.prompt(length), self._long) for _ in range(count)]
        arrivals: list[list[float]] = [[] for _ in generations]
        with ExitStack() as stack:
            threads = stack.enter_context(ThreadPoolExecutor(count))
            for generation in generations:
                stack.enter_context(closing(generation))
            readers = [threads.submit(_read, *each) for each in zip(generations, arrivals, strict=True)]

            def wait(tokens: Sequence[int]) -> None:
                """Until each has more than so many."""
                while not all(len(each) > least for each, least in zip(arrivals, tokens, strict=True)):
                    if any(reader.done() for reader in readers):
                        raise EdgeError(f"of {count} answers that were timed together one ended before it should")
                    time.sleep(_LOOK_S)

            wait([0] * count)
            begun = [len(each) for each in arrivals]
            wait([each + NEW_TOKENS for each in begun])
            found: list[Observation] = [_decoding(arrivals, begun, length)]
            if count < llm.limits.max_sequences:
                held = sum(length + len(each) for each in arrivals)
                first: list[float] = []
                submitted = time.perf_counter()
                with llm.start_completion(self.prompt(probe), self._params) as generation:
                    _read(generation, first)
                    cached = generation.usage.cached_tokens
                found.append(
                    FirstToken(prompt=probe, cached=cached, beside=count, held=held, seconds=first[0] - submitted)
                )
            for generation in generations:
                generation.cancel()
            for reader in readers:
                reader.result()
        while llm.stats.running:  # the step after which they are let go
            time.sleep(_LOOK_S)
        return found


def _decoding(arrivals: Sequence[Sequence[float]], begun: Sequence[int], length: int) -> EachToken:
    """``begun``: how many tokens each had when all of them decoded."""
    seconds = [times[first + NEW_TOKENS - 1] - times[first - 1] for times, first in zip(arrivals, begun, strict=True)]
    held = sum(length + first + NEW_TOKENS // 2 for first in begun)
    return EachToken(batch=len(arrivals), held=held, seconds=float(np.median(seconds)) / NEW_TOKENS)


def _read(generation: Generation, arrivals: list[float]) -> None:
    """When each of its tokens came, until it ends or is cancelled."""
    for chunk in generation:
        arrivals += [time.perf_counter()] * len(chunk.checked().token_ids)
