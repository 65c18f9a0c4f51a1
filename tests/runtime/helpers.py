"""Plain twins and small tools for the engine's tests."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from devices.base import Step
from edge_runtime.engine import Engine
from edge_runtime.generation import Generation
from edge_runtime.request import Chunk
from edge_runtime.sampling import SamplingParams
from tests.fake_decoder import FakeDecoder

GREEDY = SamplingParams(temperature=0, max_tokens=12)


class LetterTokenizer:
    """Token i is one letter; a text is as long as its tokens."""

    def decode(self, ids: Sequence[int], skip_special: bool = True, /) -> str:
        return "".join(letter(token) for token in ids)

    def id_to_token(self, token_id: int, /) -> str | None:
        return letter(token_id)


def letter(token: int) -> str:
    return chr(0x4E00 + token)


@dataclass
class Answer:
    """All that came of one completion."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    last: Chunk | None = None


def collect(generation: Iterable[Chunk], n: int = 1) -> list[Answer]:
    answers = [Answer() for _ in range(n)]
    for chunk in generation:
        answer = answers[chunk.index]
        assert answer.finish_reason is None, "a chunk after the last"
        answer.text += chunk.text
        answer.tokens += chunk.token_ids
        answer.finish_reason = chunk.finish_reason
        answer.last = chunk
    return answers


def greedy(decoder: FakeDecoder, prompt: Sequence[int], count: int, long_from: int | None = None) -> list[int]:
    """What temperature 0 must give: the logits' definition, without caches, batches or chunks."""
    tokens = list(prompt)
    for _ in range(count):
        state = 7 if long_from is not None and len(tokens) > long_from else 1
        for token in tokens:
            state = (state * 131 + token + 1) % len(decoder.table)
        tokens.append(int(decoder.table[state].argmax()))
    return tokens[len(prompt) :]


def start(decoder: FakeDecoder, **options: int | None) -> Engine:
    return Engine(decoder, LetterTokenizer(), vocab_size=decoder.vocab_size, **options)  # type: ignore[arg-type]


def ask(engine: Engine, prompt: Sequence[int], params: SamplingParams, eos: Sequence[int] = ()) -> Answer:
    generation: Generation = engine.submit(prompt, params, eos)
    return collect(generation, params.n)[0]


def prompt(seed: int, length: int) -> list[int]:
    """Random tokens, always the same for a seed."""
    return [int(token) for token in np.random.default_rng(seed).integers(0, 64, length)]


@contextlib.contextmanager
def serving(decoder: FakeDecoder, **options: int | None) -> Iterator[Engine]:
    """An engine that must leave nothing behind but what its prefix cache holds."""
    engine = start(decoder, **options)
    try:
        yield engine
        settle(engine)
        decoder.check_integrity()
        assert len(decoder.sequences) == engine.stats.cached_sequences
    finally:
        engine.close()
    assert not decoder.sequences


def settle(engine: Engine) -> None:
    """Wait until the engine has nothing to do: what is submitted last is served last."""
    engine.logits([0])
    engine.logits([0])


class Gate:
    """Holds forwards back until told."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.open = threading.Event()

    def __call__(self, batch: Sequence[Step]) -> None:
        self.reached.set()
        assert self.open.wait(60)
