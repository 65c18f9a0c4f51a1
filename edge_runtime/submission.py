"""What is asked of an engine. As long as nothing of the answer was sent, another engine can be asked the same."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from devices.base import Decoder, Step
from edge_runtime.completion import Completion, Reading, Request
from edge_runtime.constraints import Constraint, Grammars
from edge_runtime.detokenizer import Decoding, StopStrings, StreamDecoder, TokenDecoder, TokenText
from edge_runtime.drafting.prompt_lookup import PromptLookup
from edge_runtime.errors import EdgeError, InvalidRequest, PromptTooLong
from edge_runtime.generation import Outlet
from edge_runtime.request import Chunk
from edge_runtime.sampling import SamplingParams, check_largest, make_sampler
from edge_runtime.tools.reader import CallReader
from edge_runtime.tracing.trace import Lane
from edge_runtime.watch import Watch


@dataclass(frozen=True)
class Terms:
    """What an engine brings to every answer."""

    tokenizer: TokenDecoder
    additions: dict[int, str]
    """Of :class:`~edge_runtime.detokenizer.StreamDecoder`, shared by all of an engine."""
    vocab_size: int
    capacity: int
    """Tokens that prompt and answer may have together."""
    max_prompt: int
    prompt_lookup: bool
    grammars: Grammars | None
    """None: answers cannot be held to any."""

    @classmethod
    def of(
        cls,
        decoder: Decoder,
        tokenizer: TokenDecoder,
        vocab_size: int | None,
        prompt_lookup: bool,
        grammars: Grammars | None,
    ) -> Terms:
        """``vocab_size`` None: learned by running one token. EngineError, also if no numbers come of that."""
        limits = decoder.limits
        size = _learn_vocab_size(decoder) if vocab_size is None else vocab_size
        return cls(tokenizer, {}, size, limits.longest, min(limits.max_prompt, limits.longest), prompt_lookup, grammars)


def _learn_vocab_size(decoder: Decoder) -> int:
    sequence = decoder.new_sequence()
    try:
        (logits,) = decoder.forward([Step(sequence, np.zeros(1, np.int64), 1)])
        check_largest(float(logits.max()))
        return int(logits.shape[1])
    finally:
        sequence.close()


@dataclass(eq=False)
class Submission(ABC):
    """The question and the way its answer takes."""

    prompt: list[int]

    @property
    @abstractmethod
    def sent(self) -> bool:
        """Something of the answer has left."""

    @property
    @abstractmethod
    def new_tokens(self) -> int:
        """Room that the answer needs at least."""

    @property
    def asked(self) -> bool:
        """Whether that much was asked for by name."""
        return False

    def check(self, terms: Terms) -> None:
        """InvalidRequest or PromptTooLong, if it cannot be answered on these terms."""
        if not self.prompt:
            raise InvalidRequest("the prompt has no tokens; give at least one", "prompt")
        outside = next((token for token in self.prompt if not 0 <= token < terms.vocab_size), None)
        if outside is not None:
            raise InvalidRequest(
                f"token {outside} of the prompt is outside the vocabulary of {terms.vocab_size} tokens", "prompt"
            )
        length = len(self.prompt)
        if length > terms.max_prompt:
            raise PromptTooLong(
                f"the prompt has {length} tokens, this model and device take {terms.max_prompt}", "prompt"
            )
        if length + self.new_tokens > terms.capacity:
            wanted = ", which leaves no room for an answer"
            if self.asked:
                wanted = f" and max_tokens asks for {self.new_tokens} more"
            raise PromptTooLong(
                f"the prompt has {length} tokens{wanted}; prompt and answer together may have {terms.capacity}",
                "max_tokens" if self.asked else "prompt",
            )

    @abstractmethod
    def requests(self, ids: Iterator[int], terms: Terms) -> Sequence[Request]:
        """Anew, from the prompt on. The first is to be queued, and brings the others. InvalidRequest."""

    @abstractmethod
    def fail(self, error: EdgeError) -> None:
        """Tell whoever waits, where no request could."""


@dataclass(eq=False)
class Completing(Submission):
    """``params.n`` completions of a prompt."""

    params: SamplingParams
    """Resolved: ``max_tokens`` alone may be None."""
    eos_ids: Sequence[int]
    watch: Watch | None = None
    """Of the first completion."""
    decoding: Decoding | None = None
    """In place of the tokenizer's own."""
    reading: Callable[[], CallReader] | None = None
    """How calls of tools are found in a completion; None: there are none."""
    lane: Lane | None = None
    """Of the first completion, whichever engine makes it."""
    outlet: Outlet = field(init=False)

    def __post_init__(self) -> None:
        self.outlet = Outlet(len(self.prompt), self.params.n, None if self.lane is None else self.lane.trace)

    @property
    def sent(self) -> bool:
        return self.outlet.sent

    @property
    def new_tokens(self) -> int:
        return self.params.max_tokens or 1

    @property
    def asked(self) -> bool:
        return self.params.max_tokens is not None

    def requests(self, ids: Iterator[int], terms: Terms) -> Sequence[Completion]:
        params, prompt = self.params, self.prompt
        new = terms.capacity - len(prompt) if params.max_tokens is None else params.max_tokens
        ends = frozenset() if params.ignore_eos and params.grammar is None else frozenset(self.eos_ids)
        self.outlet.completion_tokens = 0
        if self.watch is not None:
            self.watch.restart()
        completions = [
            Completion(
                next(ids),
                list(prompt),
                outlet=self.outlet,
                sampler=make_sampler(params, terms.vocab_size, index, self._constraint(terms)),
                decoder=self._decoder(terms),
                stops=StopStrings(params.stop),
                end_tokens=frozenset(params.stop_token_ids) | ends,
                max_length=len(prompt) + new,
                index=index,
                lookup=PromptLookup() if terms.prompt_lookup else None,
                watch=self.watch if index == 0 else None,
                reader=None if self.reading is None else self.reading(),
                lane=self.lane if index == 0 else None,
            )
            for index in range(params.n)
        ]
        completions[0].siblings = completions[1:]
        return completions

    def _constraint(self, terms: Terms) -> Constraint | None:
        grammar = self.params.grammar
        if grammar is None:
            return None
        if terms.grammars is None:
            raise InvalidRequest("answers of this engine cannot be held to a grammar", "grammar")
        return terms.grammars.constraint(grammar)

    def _decoder(self, terms: Terms) -> TokenText:
        plain = StreamDecoder(terms.tokenizer, terms.additions)
        return plain if self.decoding is None else self.decoding(terms.tokenizer.decode, plain)

    def fail(self, error: EdgeError) -> None:
        for index in range(self.params.n):
            self.outlet.put(Chunk(finish_reason="error", index=index, error=error))


@dataclass(eq=False)
class Asking(Submission):
    """The model's opinion of the prompt: see :class:`~edge_runtime.completion.Reading`."""

    score: bool
    result: Future[NDArray[np.float32]] = field(default_factory=Future, init=False)
    """Cancelling it takes the question back."""

    @property
    def sent(self) -> bool:
        return self.result.done()

    @property
    def new_tokens(self) -> int:
        return 0

    def requests(self, ids: Iterator[int], terms: Terms) -> Sequence[Reading]:
        return [Reading(next(ids), list(self.prompt), score=self.score, result=self.result)]

    def fail(self, error: EdgeError) -> None:
        with suppress(InvalidStateError):  # taken back
            self.result.set_exception(error)
