"""Drafts by a smaller model, as a pruned one of the same: it says what may come next, and the model checks all of it in
one step (speculative decoding, Leviathan et al. 2023, arXiv 2211.17192).

A drafted token counts only if the sampler picks it from the model's own logits, so the answer is the one that plain
decoding gives: the same at temperature 0, and from the same distribution above it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from devices.base import Decoder, DecoderSequence, Forward, Step
from edge_runtime.completion import Request
from edge_runtime.drafting.pace import DraftPace
from edge_runtime.errors import EdgeError, OutOfKVCache

_SHORT = 2
"""Tokens of a step that drafts; longer ones catch up with the text."""
_log = logging.getLogger("edge_glm.engine")


@dataclass
class _Row:
    """A request's sequence in the draft's KV cache."""

    sequence: DecoderSequence
    agreed: int = 0
    """Tokens in it that are the request's for sure."""
    guessed: list[int] = field(default_factory=list)
    """Its own drafted tokens, which follow them."""

    def settle(self, tokens: Sequence[int]) -> int:
        """Keep of what was guessed what has come true; returns the tokens that it holds then, always one short."""
        for guess in self.guessed:
            if self.agreed >= len(tokens) - 1 or guess != tokens[self.agreed]:
                break
            self.agreed += 1
        self.guessed.clear()
        # a step that found no room in the KV cache may have left less than was meant
        self.agreed = self.sequence.crop(min(self.agreed, self.sequence.length, len(tokens) - 1))
        return self.agreed


class DraftModel:
    """Owns its decoder, whose tokens are the model's. On the engine's thread.

    Once it fails it drafts no more, and answers go on without. Where it hangs, the engine's thread hangs with it, and
    both are given up.
    """

    def __init__(self, decoder: Decoder, pace: DraftPace | None = None) -> None:
        self.pace = DraftPace() if pace is None else pace
        self.error: EdgeError | None = None
        """Why it drafts no more."""
        self._decoder = decoder
        self._forward: Forward = decoder.forward
        self._rows: dict[Request, _Row] = {}
        self._given_up: set[Request] = set()
        """For which its KV cache is too small."""

    def guard(self, guard: Callable[[Decoder], Forward]) -> None:
        """``guard``: what its steps are run by."""
        self._forward = guard(self._decoder)

    def draft(self, wanted: Mapping[Request, int]) -> Mapping[Request, Sequence[int]]:
        """For each request tokens that may come next, at most so many."""
        length = self.pace.length(len(wanted), max(wanted.values(), default=0)) if self.error is None else 0
        try:
            rows = self._admitted({each: min(length, most) for each, most in wanted.items()})
            return self._draft(rows) if rows else {}
        except OutOfKVCache:  # the longest makes room for the others
            longest = max(self._rows, key=lambda each: len(each.tokens))
            self.release(longest)
            self._given_up.add(longest)
            return {}
        except EdgeError as error:  # it is only a help
            self.error = error
            _log.warning("nothing is drafted any more: %s", error)
            self.close()
            return {}

    def saw(self, steps: Sequence[Step], seconds: float) -> None:
        """A batch of the model has taken so long. One with a chunk of a prompt tells nothing of decoding."""
        if all(step.rows == len(step.tokens) for step in steps):
            self.pace.step_took(sum(step.rows for step in steps), seconds)

    def release(self, request: Request) -> None:
        """It is over, or has to be computed again."""
        self._given_up.discard(request)
        row = self._rows.pop(request, None)
        if row is not None:
            with suppress(EdgeError):
                row.sequence.close()

    def close(self) -> None:
        for request in list(self._rows):
            self.release(request)
        with suppress(EdgeError):
            self._decoder.close()

    def _admitted(self, lengths: Mapping[Request, int]) -> dict[Request, int]:
        """Those of them that there is room for."""
        limits = self._decoder.limits
        places = limits.max_sequences - len(self._rows)
        rows = {}
        for request, length in lengths.items():
            fits = length > 0 and request not in self._given_up and len(request.tokens) + length <= limits.longest
            if fits and (request in self._rows or places > 0):
                places -= request not in self._rows
                rows[request] = length
        return rows

    def _draft(self, rows: Mapping[Request, int]) -> Mapping[Request, Sequence[int]]:
        drafts: dict[Request, list[int]] = {each: [] for each in rows}
        newest = {each: self._catch_up(each) for each in rows}
        while newest:
            logits = self._run([Step(self._rows[each].sequence, step) for each, step in newest.items()])
            for request, row in zip(newest, logits, strict=True):
                drafts[request].append(int(row[-1].argmax()))
            newest = {each: self._guess(each, drafts[each][-1]) for each in newest if len(drafts[each]) < rows[each]}
        return drafts

    def _run(self, batch: Sequence[Step]) -> list[NDArray[np.float32]]:
        started = time.perf_counter()
        logits = self._forward(batch)
        seconds = time.perf_counter() - started
        if all(len(step.tokens) <= _SHORT for step in batch):
            self.pace.draft_took(len(batch), seconds)
        else:
            self.pace.caught_up(seconds)
        return logits

    def _guess(self, request: Request, token: int) -> NDArray[np.int64]:
        self._rows[request].guessed.append(token)
        return np.array([token], np.int64)

    def _catch_up(self, request: Request) -> NDArray[np.int64]:
        """Read what it has not read of the request's tokens; the last chunk of them is returned, to be read yet."""
        row = self._rows.get(request)
        if row is None:
            row = self._rows[request] = _Row(self._decoder.new_sequence(len(request.tokens)))
        tokens = np.array(request.tokens[row.settle(request.tokens) :], np.int64)
        chunk = self._decoder.limits.prefill_chunk
        while len(tokens) > chunk:
            self._run([Step(row.sequence, tokens[:chunk], rows=0)])
            tokens = tokens[chunk:]
        row.agreed = len(request.tokens)
        return tokens
