"""Requests inside the engine: each owns its tokens, its sequence and what is done with the logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from devices.base import DecoderSequence
from edge_runtime.chunks import next_chunk
from edge_runtime.detokenizer import StopStrings, TokenText
from edge_runtime.drafting.prompt_lookup import PromptLookup
from edge_runtime.errors import EdgeError
from edge_runtime.generation import Outlet
from edge_runtime.request import PLAIN, Chunk, FinishReason, Kind
from edge_runtime.sampling import Sampler, TokenLogprob, check_largest, log_sum_exp
from edge_runtime.tools.reader import CallReader
from edge_runtime.tracing.trace import Lane
from edge_runtime.watch import Watch

READING_CHUNK = 64
"""Tokens per step when every token's logits come back: 64 rows of a 150k vocabulary are 38 MB."""


@dataclass(eq=False)
class Request(ABC):
    """Tokens that have to go through the decoder. Only the engine's thread touches one, once it is submitted."""

    id: int
    """Order of arrival."""
    tokens: list[int]
    """Prompt, then output."""
    prompt_length: int = field(init=False)
    sequence: DecoderSequence | None = None
    """None: not admitted, preempted or finished."""
    kind: Kind = PLAIN
    """Of its sequence; once chosen, the type of the KV cache stays."""
    reused: int = 0
    """Tokens that were in the KV cache already when it was admitted."""
    finished: bool = False
    lane: Lane | None = None
    """Where its time is written down. None: nobody wants to know."""

    def __post_init__(self) -> None:
        self.prompt_length = len(self.tokens)

    @property
    def fed(self) -> int:
        """Tokens in the KV cache."""
        return 0 if self.sequence is None else self.sequence.length

    @property
    def pending(self) -> int:
        """Tokens still to feed: 1 while decoding, more in prefill."""
        return len(self.tokens) - (0 if self.sequence is None else self.sequence.length)

    @property
    @abstractmethod
    def cancelled(self) -> bool:
        """Whoever waited has left."""

    def chunk(self, limit: int) -> int:
        """How many tokens to feed next, at most ``limit``; never so that a single one is left over."""
        return next_chunk(self.pending, limit)

    def rows(self, count: int) -> int:
        """Logits wanted from a step that feeds ``count`` tokens."""
        return 1 if count == self.pending else 0

    def draft(self, limit: int) -> list[int]:
        """At most ``limit`` tokens that may come after those there are, to be checked along with the next step."""
        return []

    @property
    def draftable(self) -> int:
        """Tokens that it may have beyond the next one."""
        return 0

    @abstractmethod
    def take(self, logits: NDArray[np.float32], draft: Sequence[int] = ()) -> None:
        """Use the logits (rows, vocab) of the step that has just been run, whose last tokens were ``draft``.

        EngineError if they are broken.
        """

    @abstractmethod
    def finish(self, reason: FinishReason, error: EdgeError | None = None) -> None:
        """End it, once; tells whoever waits."""


@dataclass(eq=False)
class Completion(Request):
    """One completion of a prompt."""

    outlet: Outlet = field(kw_only=True)
    sampler: Sampler = field(kw_only=True)
    decoder: TokenText = field(kw_only=True)
    stops: StopStrings = field(kw_only=True)
    end_tokens: frozenset[int] = field(kw_only=True)
    max_length: int = field(kw_only=True)
    """Prompt and output tokens at which it ends with "length"."""
    index: int = field(kw_only=True)
    lookup: PromptLookup | None = field(default=None, kw_only=True)
    """Where drafts come from. None: nothing is drafted."""
    watch: Watch | None = field(default=None, kw_only=True)
    """Who wants to know what the model thinks of prompt and answer."""
    reader: CallReader | None = field(default=None, kw_only=True)
    """What finds calls of tools in the text. None: there are none."""
    siblings: list[Completion] = field(default_factory=list, kw_only=True)
    """Completions of the same prompt that start from this one's prefill."""
    _tokens: list[int] = field(default_factory=list, init=False)
    _logprobs: list[TokenLogprob] = field(default_factory=list, init=False)

    @property
    def cancelled(self) -> bool:
        return self.outlet.cancelled

    def rows(self, count: int) -> int:
        rows = super().rows(count)
        if rows and self.watch is not None and len(self.tokens) == self.prompt_length:
            rows = min(count, self.watch.prompt_tokens + 1)
        return rows

    @property
    def draftable(self) -> int:
        return 0 if self.siblings else max(self.max_length - len(self.tokens) - 1, 0)

    def draft(self, limit: int) -> list[int]:
        limit = min(limit, self.draftable)
        return self.lookup.draft(self.tokens, limit) if self.lookup is not None and limit > 0 else []

    def take(self, logits: NDArray[np.float32], draft: Sequence[int] = ()) -> None:
        """The last row: the next token. With a draft a row for each place: they count as far as the draft holds."""
        if not draft:
            if self.watch is not None and len(logits) > 1:
                self.watch.prompt(logits[:-1], self.tokens[-len(logits) + 1 :])
            logits = logits[-1:]
        for row in range(len(logits)):
            self._add(logits[row])
            if self.lane is not None:
                self.lane.mark("detokenize")
            if self.finished or row == len(draft) or self.tokens[-1] != draft[row]:
                break
        if draft and self.lookup is not None:
            self.lookup.report(len(draft), row)

    def _add(self, logits: NDArray[np.float32]) -> None:
        sampled = self.sampler(logits, self.tokens, self.prompt_length)
        token = sampled.token_id
        if self.lane is not None:
            self.lane.mark("sample")
        if self.watch is not None:
            self.watch.token(logits, token)
        self.tokens.append(token)
        self.outlet.completion_tokens += 1
        self._tokens.append(token)
        if sampled.logprob is not None:
            self._logprobs.append(sampled.logprob)
        if token in self.end_tokens:
            self.finish("stop")
            return
        text, stopped = self.stops.add(self.decoder.add(token))
        if stopped:
            self._put(text, "stop")
        elif len(self.tokens) >= self.max_length:
            self.finish("length", text=text)
        elif text:
            self._put(text)

    def finish(self, reason: FinishReason, error: EdgeError | None = None, text: str = "") -> None:
        if self.finished:
            return
        if reason != "error":  # after a failure nothing is safe to call, and everyone must still be told
            rest, stopped = self.stops.add(self.decoder.flush())
            text += rest if stopped else rest + self.stops.flush()
            if stopped and reason == "length":
                reason = "stop"  # the stop string was complete, but its last character waited in the decoder
        self._put(text, reason, error)
        if reason in ("error", "cancelled"):  # before its prefill was done: those who wait for it share its fate
            siblings, self.siblings = self.siblings, []
            for sibling in siblings:
                sibling.finish(reason, error)

    def _put(self, text: str, reason: FinishReason | None = None, error: EdgeError | None = None) -> None:
        extra = None
        if self.reader is not None:
            text, extra, reason = self._read(text, reason)
            if not (text or extra or reason):
                return
        self.finished = reason is not None
        tokens, logprobs = tuple(self._tokens), tuple(self._logprobs)
        chunk = Chunk(text, tokens, reason, logprobs, index=self.index, error=error, extra=extra)
        self._tokens, self._logprobs = [], []
        self.outlet.put(chunk)

    def _read(self, text: str, reason: FinishReason | None) -> tuple[str, dict[str, Any] | None, FinishReason | None]:
        """(content, calls of tools, why it ended) of what has come."""
        assert self.reader is not None
        text, pieces = self.reader.add(text)
        if reason is not None:
            rest, more = self.reader.flush()
            text, pieces = text + rest, pieces + more
            if reason == "stop" and self.reader.called:
                reason = "tool_calls"
        return text, {"tool_calls": pieces} if pieces else None, reason


@dataclass(eq=False)
class Reading(Request):
    """The model's opinion of given tokens; nothing is generated.

    ``score``: log p of every token but the first, given those before it; else the logits after the last token.
    """

    score: bool = field(kw_only=True)
    result: Future[NDArray[np.float32]] = field(default_factory=Future, kw_only=True)
    """Cancelled by whoever asked, if the answer is not wanted any more."""
    _scores: NDArray[np.float32] = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._scores = np.zeros(max(len(self.tokens) - 1, 0), np.float32)

    @property
    def cancelled(self) -> bool:
        return self.result.cancelled()

    def chunk(self, limit: int) -> int:
        return super().chunk(min(limit, READING_CHUNK) if self.score else limit)

    def rows(self, count: int) -> int:
        return count if self.score else super().rows(count)

    def take(self, logits: NDArray[np.float32], draft: Sequence[int] = ()) -> None:
        if self.score:
            first = self.fed - len(logits)
            for row, (position, following) in zip(logits, self._following(first), strict=False):
                self._scores[position] = row[following] - log_sum_exp(row)
        elif self.pending == 0:
            check_largest(float(logits[-1].max()))
        if self.pending == 0:
            self.finished = True
            with suppress(InvalidStateError):  # cancelled at this moment
                self.result.set_result(self._scores if self.score else logits[-1].copy())

    def _following(self, first: int) -> Sequence[tuple[int, int]]:
        """(position, token after it) from ``first`` on."""
        return list(enumerate(self.tokens[first + 1 :], start=first))

    def finish(self, reason: FinishReason, error: EdgeError | None = None) -> None:
        if self.finished:
            return
        self.finished = True
        if error is None:
            self.result.cancel()
        else:
            with suppress(InvalidStateError):  # cancelled already
                self.result.set_exception(error)
