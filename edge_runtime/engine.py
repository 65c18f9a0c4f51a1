"""The decoder loop: continuous batching over one decoder, driven by one thread.

Any thread may submit; only the engine's thread touches the decoder, its sequences, the scheduler and the prefix cache.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from devices.base import Decoder, DecoderLimits, Step
from devices.stopwatch import Stopwatch
from edge_runtime.completion import Completion, Reading, Request
from edge_runtime.detokenizer import StopStrings, StreamDecoder, TokenDecoder
from edge_runtime.errors import (
    DeviceError,
    EdgeError,
    EngineError,
    EngineStopped,
    InvalidRequest,
    OutOfKVCache,
    Overloaded,
    PromptTooLong,
)
from edge_runtime.generation import EngineGeneration, Generation, Outlet
from edge_runtime.prefix_cache import PrefixCache
from edge_runtime.prefix_store import PrefixStore
from edge_runtime.prompt_lookup import PromptLookup
from edge_runtime.sampling import SamplingParams, make_sampler
from edge_runtime.scheduler import Scheduler, Work

IDLE_S = 0.25
"""After so long without work prefixes are stored, a segment at a time."""


@dataclass(frozen=True)
class EngineStats:
    """A glance at the engine, for operators."""

    running: int
    waiting: int
    cached_sequences: int
    cached_tokens: int
    generated_tokens: int
    prompt_tokens: int
    """Prompt tokens computed, not counting cached ones."""
    preemptions: int
    drafted_tokens: int
    accepted_tokens: int
    """Of the drafted ones, those that held."""
    forward_seconds: float
    """Time the decoder has taken so far, failed steps included."""
    inference_seconds: float
    """Of it, time inside the inference engine's own calls."""


class Engine:
    """Runs requests over a decoder, which belongs to the engine from now on and is closed with it.

    ``vocab_size`` None: learned by running one token, which also makes the device pack its weights before the first
    request. ``max_queue``: requests that may wait for a place. ``prefix_cache_bytes``: KV cache that finished
    sequences may go on holding; None: whatever running requests do not need; 0: none. ``prefix_store``: where prefixes
    outlive the engine. ``prompt_lookup``: draft tokens from what prompt and answer have said before.
    ``batch_invariant``: see :class:`edge_runtime.scheduler.Scheduler`, ``in_pairs``; the decoder's option is its half.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: TokenDecoder,
        *,
        vocab_size: int | None = None,
        max_queue: int = 256,
        prefix_cache_bytes: int | None = None,
        prefix_store: PrefixStore | None = None,
        prompt_lookup: bool = False,
        batch_invariant: bool = False,
    ) -> None:
        self._decoder = decoder
        self._tokenizer = tokenizer
        self._additions: dict[int, str] = {}
        self._vocab_size = _learn_vocab_size(decoder) if vocab_size is None else vocab_size
        self._max_queue = max_queue
        self._prompt_lookup = prompt_lookup
        limits = decoder.limits
        self._capacity = min(limits.max_context, limits.kv_tokens)
        if prefix_cache_bytes is None:
            prefix_cache_bytes = limits.kv_tokens * limits.kv_bytes_per_token
        self._cache = PrefixCache(prefix_cache_bytes, kv_block=limits.kv_block, store=prefix_store)
        self._scheduler = Scheduler(decoder, self._cache, in_pairs=batch_invariant)
        self._ids = itertools.count()
        self._generated = 0
        self._drafted = 0
        self._accepted = 0
        self._prefilled = 0
        self._forwarding = Stopwatch()

        self._live: set[Request] = set()
        """Requests taken from the inbox and not let go yet: each is running, or waiting, or waits for a sibling."""

        self._changed = threading.Condition()  # guards the three below; the engine's thread may look without
        self._inbox: list[Sequence[Request]] = []
        """Requests that came together: the first is queued, and brings the others."""
        self._closing = False
        self._stopped: EngineStopped | None = None

        self._thread = threading.Thread(target=self._run, name="edge-glm engine", daemon=True)
        self._thread.start()

    # --- any thread ---------------------------------------------------------------------------------------------------

    @property
    def limits(self) -> DecoderLimits:
        return self._decoder.limits

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def alive(self) -> bool:
        """False once closed, or when its thread has died."""
        return self._stopped is None and not self._closing

    @property
    def stats(self) -> EngineStats:
        return EngineStats(
            running=len(self._scheduler.running),
            waiting=self._queued(),
            cached_sequences=len(self._cache),
            cached_tokens=self._cache.tokens,
            generated_tokens=self._generated,
            prompt_tokens=self._prefilled,
            preemptions=self._scheduler.preemptions,
            drafted_tokens=self._drafted,
            accepted_tokens=self._accepted,
            forward_seconds=self._forwarding.seconds,
            inference_seconds=self._decoder.engine_seconds,
        )

    def submit(self, prompt_ids: Sequence[int], params: SamplingParams, eos_ids: Sequence[int] = ()) -> Generation:
        """Queue a prompt; returns at once. ``params`` that are None get the global defaults.

        Raises InvalidRequest, PromptTooLong (the prompt, or the prompt and ``max_tokens``, over the context),
        Overloaded (queue full), EngineStopped.
        """
        prompt = self._checked(prompt_ids, params.max_tokens or 1, params.max_tokens is not None)
        params = params.resolved()
        outlet = Outlet(len(prompt), params.n)
        new = self._capacity - len(prompt) if params.max_tokens is None else params.max_tokens
        completions = [
            Completion(
                next(self._ids),
                list(prompt),
                outlet=outlet,
                sampler=make_sampler(params, self._vocab_size, index),
                decoder=StreamDecoder(self._tokenizer, self._additions),
                stops=StopStrings(params.stop),
                end_tokens=frozenset(params.stop_token_ids)
                | (frozenset() if params.ignore_eos else frozenset(eos_ids)),
                max_length=len(prompt) + new,
                index=index,
                lookup=PromptLookup() if self._prompt_lookup else None,
            )
            for index in range(params.n)
        ]
        completions[0].siblings = completions[1:]
        self._enqueue(completions)
        return EngineGeneration(outlet)

    def score(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """(len(ids)-1,) float32: log p(ids[i+1] | ids[:i+1]). Raises as :meth:`submit`, and DeviceError."""
        return self._read(ids, score=True)

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """(vocab,) float32 logits after the last token. Raises as :meth:`submit`, and DeviceError."""
        return self._read(ids, score=False)

    def close(self) -> None:
        """End every request with EngineStopped and close the decoder. Idempotent."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, ids: Sequence[int], score: bool) -> NDArray[np.float32]:
        reading = Reading(next(self._ids), self._checked(ids, 0, False), score=score)
        self._enqueue([reading])
        try:
            return reading.result.result()
        except BaseException:  # Ctrl-C in the caller's thread
            reading.abandoned = True
            raise

    def _checked(self, ids: Sequence[int], new_tokens: int, asked: bool) -> list[int]:
        prompt = [int(token) for token in ids]
        if not prompt:
            raise InvalidRequest("the prompt has no tokens; give at least one", "prompt")
        outside = next((token for token in prompt if not 0 <= token < self._vocab_size), None)
        if outside is not None:
            raise InvalidRequest(
                f"token {outside} of the prompt is outside the vocabulary of {self._vocab_size} tokens", "prompt"
            )
        limit = min(self._decoder.limits.max_prompt, self._capacity)
        if len(prompt) > limit:
            raise PromptTooLong(f"the prompt has {len(prompt)} tokens, this model and device take {limit}", "prompt")
        if len(prompt) + new_tokens > self._capacity:
            wanted = f" and max_tokens asks for {new_tokens} more" if asked else ", which leaves no room for an answer"
            raise PromptTooLong(
                f"the prompt has {len(prompt)} tokens{wanted}; prompt and answer together may have {self._capacity}",
                "max_tokens" if asked else "prompt",
            )
        return prompt

    def _enqueue(self, requests: Sequence[Request]) -> None:
        with self._changed:
            if self._stopped is not None:
                raise EngineStopped(str(self._stopped)) from self._stopped
            if self._closing:
                raise EngineStopped("the engine has been closed")
            if self._queued() >= self._max_queue:
                raise Overloaded(f"{self._max_queue} requests are waiting already; try again later")
            self._inbox.append(requests)
            self._changed.notify()

    def _queued(self) -> int:
        return len(self._inbox) + len(self._scheduler.waiting)

    # --- the engine's thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        error = EngineStopped("the engine has been closed")
        try:
            while self._collect():
                self._postprocess(*self._forward(self._scheduler.next()))  # keeps no logits: the next take their place
        except BaseException as cause:
            error = EngineStopped(f"the engine's thread died: {type(cause).__name__}: {cause}; open the model again")
            error.__cause__ = cause
        finally:
            self._stop(error)

    def _collect(self) -> bool:
        """Wait for something to do, take in new requests and let go what is over. False: the engine is closing."""
        while not self._busy():
            self._wait()
        if self._inbox:
            self._take_in()
        over = [request for request in self._live if request.finished or request.cancelled]
        if over:
            self._let_go(over)
        return not self._closing

    def _busy(self) -> bool:
        return bool(self._live or self._inbox or self._closing)

    def _wait(self) -> None:
        """For something to do. After a while without, a segment of a prefix is stored."""
        with self._changed:
            busy = self._changed.wait_for(self._busy, IDLE_S if self._cache.unsaved else None)
        if not busy:
            self._cache.save_next()

    def _take_in(self) -> None:
        with self._changed:
            for requests in self._inbox:
                self._scheduler.add(requests[0])
                self._live.update(requests)
            self._inbox.clear()

    def _let_go(self, requests: Sequence[Request]) -> None:
        """Free what they hold."""
        for request in requests:
            request.finish("cancelled")  # unless it has finished otherwise
        for request in [request for request in self._live if request.finished]:
            self._live.remove(request)
            self._scheduler.release(request, keep=isinstance(request, Completion))

    def _forward(self, batch: list[Work]) -> tuple[list[Work], list[NDArray[np.float32]]]:
        while batch:
            try:
                with self._forwarding:
                    return batch, self._decoder.forward([work.step for work in batch])
            except OutOfKVCache as error:
                batch = self._scheduler.make_room(batch, error)
            except DeviceError as error:  # the batch's sequences are undefined now, the others are sound
                for work in batch:
                    self._fail(work.request, error)
                batch = []
        return [], []

    def _postprocess(self, batch: list[Work], results: list[NDArray[np.float32]]) -> None:
        for work, logits in zip(batch, results, strict=True):
            request = work.request
            if work.start < request.prompt_length:
                self._prefilled += min(len(work.step.tokens), request.prompt_length - work.start)
            self._take(request, logits, work.draft)
            if isinstance(request, Completion) and request.siblings and len(logits):
                siblings, request.siblings = request.siblings, []
                for sibling in siblings:
                    if self._scheduler.fork(request, sibling):
                        self._take(sibling, logits)

    def _take(self, request: Request, logits: NDArray[np.float32], draft: Sequence[int] = ()) -> None:
        before = len(request.tokens)
        try:
            request.take(logits, draft)
        except EngineError as error:
            self._fail(request, error)
            return
        new = len(request.tokens) - before
        self._generated += new
        if draft:
            self._drafted += len(draft)
            self._accepted += new - 1
            if request.sequence is not None:
                request.sequence.crop(len(request.tokens) - 1)  # a device may keep less: it is fed again

    def _fail(self, request: Request, error: EdgeError) -> None:
        request.finish("error", error)
        self._scheduler.release(request, keep=False)

    def _stop(self, error: EngineStopped) -> None:
        with self._changed:
            self._stopped = error
            unread = [request for requests in self._inbox for request in requests]
            self._inbox.clear()
        for request in [*self._live, *unread]:
            request.finish("error", error)
        self._live.clear()
        self._scheduler.waiting.clear()
        self._scheduler.running.clear()
        try:
            self._cache.close()
        finally:
            self._decoder.close()  # its sequences die with it


def _learn_vocab_size(decoder: Decoder) -> int:
    sequence = decoder.new_sequence()
    try:
        (logits,) = decoder.forward([Step(sequence, np.zeros(1, np.int64), 1)])
        return int(logits.shape[1])
    finally:
        sequence.close()


__all__ = ["Engine", "EngineStats", "Generation"]
