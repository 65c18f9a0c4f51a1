"""Plain twins and small tools for the engine's tests."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from edge_runtime.engine import Engine
from edge_runtime.generation import Generation
from edge_runtime.request import Chunk
from edge_runtime.sampling import SamplingParams
from tests.fake_decoder import FakeDecoder


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
