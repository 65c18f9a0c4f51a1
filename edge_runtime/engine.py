"""The decoder loop: continuous batching over one decoder, driven by one thread.

Any thread may submit; only the engine's thread touches the decoder, its sequences, the scheduler and the prefix cache.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from devices.base import Decoder, DecoderLimits, Trimming
from edge_runtime.completion import Completion, Request
from edge_runtime.constraints import Grammars
from edge_runtime.detokenizer import Decoding, TokenDecoder
from edge_runtime.drafting.draft_model import DraftModel
from edge_runtime.engine_stats import EngineStats
from edge_runtime.errors import (
    DeviceError,
    EdgeError,
    EngineStopped,
    StepTimeout,
)
from edge_runtime.generation import EngineGeneration, Generation
from edge_runtime.handover import Estate, HandOver, Open, Successor
from edge_runtime.heap import return_free_heap
from edge_runtime.heartbeat import HEARTBEAT, Heartbeat
from edge_runtime.inbox import CLOSED, Inbox
from edge_runtime.prefix_cache import PrefixCache
from edge_runtime.prefix_store import PrefixStore
from edge_runtime.recovery import Recovery
from edge_runtime.sampling import SamplingParams
from edge_runtime.scheduler import NotStarted, Scheduler
from edge_runtime.step_watch import STEP_TIMEOUT_S, Abandoned, StepWatch
from edge_runtime.steps import Steps
from edge_runtime.submission import Asking, Completing, Submission, Terms
from edge_runtime.tools.reader import CallReader
from edge_runtime.tracing import trace as tracing
from edge_runtime.watch import Watch

IDLE_S = 0.25
"""After so long without work prefixes are stored, a segment at a time."""
TRIM_S = 5.0
"""After so long without work memory that only a busier time has needed goes back to the system."""
CLOSING_S = 5.0
"""So long closing waits for the step that runs."""


class Engine:
    """Runs requests over a decoder, which belongs to the engine from now on and is closed with it.

    ``vocab_size`` None: learned by running one token, which also makes the device pack its weights before the first
    request. ``max_queue``: requests that may wait for a place. ``prefix_cache_bytes``: KV cache that finished
    sequences may go on holding; None: whatever running requests do not need; 0: none. ``prefix_store``: where prefixes
    outlive the engine. ``prompt_lookup``: draft tokens from what prompt and answer have said before.
    ``draft``: a smaller model of the same tokens, the engine's, too, that drafts where that pays
    (:mod:`edge_runtime.drafting.draft_model`). ``grammars``: of its tokenizer; None: an answer can be held to none.
    ``batch_invariant``: see :class:`edge_runtime.scheduler.Scheduler`, ``in_pairs``; the decoder's option is its half.

    A step that fails is run again, its requests one by one: what fails alone, too, ends with the error, the others end
    as they would have. A device that fails at anything, keeps failing, or gives no numbers, is at fault itself
    (:mod:`edge_runtime.recovery`): then the requests of that step end with the error. With a ``successor`` all requests
    of which something was sent do, and the others are answered by the engine that it opens. A step that does not end is
    such a failure, too: ``step_timeout`` seconds are what each may take at least, more where steps were slow
    (:mod:`edge_runtime.step_watch`); None: whatever it takes. ``heartbeat``: what looks after that.
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
        draft: DraftModel | None = None,
        grammars: Grammars | None = None,
        batch_invariant: bool = False,
        step_timeout: float | None = STEP_TIMEOUT_S,
        heartbeat: Heartbeat = HEARTBEAT,
        successor: Successor = lambda error: None,
    ) -> None:
        self._decoder = decoder
        self._successor = successor
        limits = decoder.limits
        self._terms = Terms.of(decoder, tokenizer, vocab_size, prompt_lookup, grammars)
        self._watch = None if step_timeout is None else StepWatch(step_timeout, heartbeat, self._give_up)
        forward = decoder.forward if self._watch is None else self._watch.guard(decoder)
        if self._watch is not None and draft is not None:
            draft.guard(self._watch.guard)
        if prefix_cache_bytes is None:
            prefix_cache_bytes = limits.kv_tokens * limits.kv_bytes_per_token
        self._cache = PrefixCache(prefix_cache_bytes, kv_block=limits.kv_block, store=prefix_store)
        self._scheduler = Scheduler(decoder, self._cache, in_pairs=batch_invariant, drafter=draft)
        self._recovery = Recovery(decoder, self._scheduler, forward, successor)
        self._steps = Steps(forward, self._scheduler, self._recovery, draft)
        self._ids = itertools.count()
        self._trimmed = True

        self._inbox = Inbox(max_queue, lambda: len(self._scheduler.waiting))
        self._kv_limits: tuple[int | None, int | None] = (None, None)
        """Of running requests, and of finished ones."""
        self._limited: tuple[int | None, int | None] = self._kv_limits
        self._estate = Estate(decoder, draft, self._scheduler, self._cache, self._inbox)
        self._live = self._estate.live

        self._thread = threading.Thread(target=self._run, name="edge-glm engine", daemon=True)
        self._thread.start()

    # --- any thread ---------------------------------------------------------------------------------------------------

    @property
    def limits(self) -> DecoderLimits:
        return self._decoder.limits

    @property
    def vocab_size(self) -> int:
        return self._terms.vocab_size

    @property
    def grammars(self) -> Grammars | None:
        """What answers can be held to; None: to nothing."""
        return self._terms.grammars

    @property
    def alive(self) -> bool:
        """False once closed, or when its thread has died."""
        return self._inbox.open

    @property
    def failure(self) -> str | None:
        """Why it answers no more, if nobody has closed it and nothing has taken its place."""
        return self._estate.failure

    @property
    def idle(self) -> bool:
        """Nothing runs, and nothing waits."""
        return not self._live and self._inbox.queued == 0

    @property
    def kv_bytes_used(self) -> int:
        """Of KV cache, by what runs and by what is kept for prompts that begin alike; about."""
        tokens = sum(map(_fed, list(self._scheduler.running))) + self._cache.tokens
        return tokens * self.limits.kv_bytes_per_token

    @property
    def kv_limit(self) -> int | None:
        """As :meth:`limit_kv` has set it."""
        return self._kv_limits[0]

    def limit_kv(self, nbytes: int | None, cached: int | None = None) -> None:
        """Use no more KV cache than that from now on, and of it for finished sequences no more than ``cached``; None:
        what there is."""
        self._kv_limits = nbytes, cached
        self._inbox.wake()

    @property
    def stats(self) -> EngineStats:
        return EngineStats(
            running=len(self._scheduler.running),
            running_tokens=sum(map(_fed, list(self._scheduler.running))),
            waiting=self._inbox.queued,
            pending=self._pending(),
            cached_sequences=len(self._cache),
            cached_tokens=self._cache.tokens,
            generated_tokens=self._steps.generated,
            prompt_tokens=self._steps.prefilled,
            preemptions=self._scheduler.preemptions,
            drafted_tokens=self._steps.drafted,
            accepted_tokens=self._steps.accepted,
            forward_seconds=self._steps.forwarding.seconds,
            inference_seconds=self._decoder.engine_seconds,
        )

    def known(self, ids: Sequence[int]) -> int:
        """How many first ones of ``ids`` the prefix cache could give just now: a glance, which does not wait."""
        return self._cache.glance(ids)

    def submit(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        eos_ids: Sequence[int] = (),
        watch: Watch | None = None,
        decoding: Decoding | None = None,
        reading: Callable[[], CallReader] | None = None,
    ) -> Generation:
        """Queue a prompt; returns at once. ``params`` that are None get the global defaults. ``watch`` hears what the
        model thinks of prompt and answer; ``decoding`` turns tokens into text in place of the tokenizer's own way,
        ``reading`` finds calls of tools in that.

        Raises InvalidRequest, PromptTooLong (the prompt, or the prompt and ``max_tokens``, over the context),
        Overloaded (queue full), EngineStopped.
        """
        here = tracing.current()
        lane = None if here is None else here.trace.lane("engine")
        submission = Completing(_token_list(prompt_ids), params.resolved(), eos_ids, watch, decoding, reading, lane)
        self._enqueue(submission)
        return EngineGeneration(submission.outlet)

    def score(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """(len(ids)-1,) float32: log p(ids[i+1] | ids[:i+1]). Raises as :meth:`submit`, and DeviceError."""
        return self._read(ids, score=True)

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """(vocab,) float32 logits after the last token. Raises as :meth:`submit`, and DeviceError."""
        return self._read(ids, score=False)

    def resume(self, submissions: Iterable[Submission]) -> None:
        """Answer what another engine could not, however many are waiting here. Those that this one cannot answer are
        told why."""
        for submission in submissions:
            try:
                self._enqueue(submission, queued_before=True)
            except EdgeError as error:
                submission.fail(error)

    def replace(self, open_successor: Open) -> None:
        """Let another engine take over between requests: this one ends what it has begun and closes, and what came
        meanwhile is answered by the other, which ``open_successor`` opens then, on this one's thread.

        Returns when it has. What ``open_successor`` raises, and then nobody has taken over; EngineStopped, if this one
        ends otherwise before; ValueError, if it is to be replaced already.
        """
        self._estate.replace(open_successor)

    def close(self) -> None:
        """End every request with EngineStopped and close the decoder. Idempotent. A step that does not end soon is not
        waited for, unless steps may take whatever they take (``step_timeout``); the decoder is closed once it does."""
        self._inbox.close()
        if self._watch is not None:
            self._watch.hurry(CLOSING_S)
        if threading.current_thread() is not self._thread:
            self._estate.settled.wait()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _pending(self) -> tuple[int, ...]:
        """Copies first: the engine's thread goes on meanwhile. A cached prefix of what waits is not known yet."""
        unread = [letter.requests[0] for letter in self._inbox.waiting]
        requests = [*list(self._scheduler.running), *self._scheduler.waiting.copy(), *unread]
        left = [len(request.tokens) - _fed(request) for request in requests]
        return tuple(tokens for tokens in left if tokens > 1)

    def _read(self, ids: Sequence[int], score: bool) -> NDArray[np.float32]:
        submission = Asking(_token_list(ids), score)
        self._enqueue(submission)
        try:
            return submission.result.result()
        except BaseException:  # Ctrl-C in the caller's thread
            submission.result.cancel()
            raise

    def _enqueue(self, submission: Submission, *, queued_before: bool = False) -> None:
        submission.check(self._terms)
        self._inbox.put(submission, submission.requests(self._ids, self._terms), queued_before=queued_before)

    # --- the engine's thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._step():
                pass
        except Abandoned:
            self._estate.close_late()
            return
        except HandOver as end:
            self._estate.hand_over(end)
        except BaseException as cause:
            error = EngineStopped(f"the engine's thread died: {type(cause).__name__}: {cause}; open the model again")
            error.__cause__ = cause
            self._estate.failure = str(error)
            self._estate.close(error)
        else:
            self._estate.close(EngineStopped(CLOSED))
        finally:
            self._unwatch()

    def _step(self) -> bool:
        """False: the engine is closing."""
        try:
            if not self._collect():
                return False
            self._trimmed = False
            self._steps.run(self._scheduler.next())
        except NotStarted as end:
            self._recovery.failed([end.request], end.error)
        except DeviceError as error:  # of a sequence; nothing says that the others are sound
            self._recovery.failed(self._scheduler.running, error)
        return True

    def _collect(self) -> bool:
        """Wait for something to do, take in new requests and let go what is over. False: the engine is closing."""
        while not self._busy():
            self._wait()
        if self._estate.wanted is not None:
            self._leave(self._estate.wanted)
        elif self._inbox:
            self._take_in()
        if self._limited != self._kv_limits:
            self._limited = self._kv_limits
            self._scheduler.kv_limit = self._limited[0]
            self._cache.limit(self._limited[1])
        over = [request for request in self._live if request.finished or request.cancelled]
        if over:
            self._let_go(over)
        return not self._inbox.closing

    def _busy(self) -> bool:
        limited = self._limited != self._kv_limits
        return bool(self._live or self._inbox or self._inbox.closing or self._estate.wanted or limited)

    def _wait(self) -> None:
        """For something to do. After a while without, a segment of a prefix is stored, or memory given back."""
        if self._cache.unsaved:
            if not self._inbox.wait(self._busy, IDLE_S):
                self._cache.save_next()
        elif not self._inbox.wait(self._busy, None if self._trimmed else TRIM_S):
            self._trim()

    def _trim(self) -> None:
        self._trimmed = True
        if isinstance(self._decoder, Trimming):
            with suppress(EdgeError):  # then it stays as it is
                self._decoder.trim()
        return_free_heap()

    def _take_in(self) -> None:
        for letter in self._inbox.take():
            self._scheduler.add(letter.requests[0])
            self._live.take(letter)

    def _leave(self, open_successor: Open) -> None:
        """Once what has been begun is over."""
        self._estate.put_back()
        if not self._live and not self._inbox.closing:
            raise HandOver(f"{self._decoder.device} was replaced", open_successor)

    def _let_go(self, requests: Sequence[Request]) -> None:
        """Free what they hold."""
        for request in requests:
            if request.lane is not None and request.sequence is None and not request.finished:
                request.lane.mark("queue")  # until whoever waited has left
            request.finish("cancelled")  # unless it has finished otherwise
        for request in self._live.drop_finished():
            self._scheduler.release(request, keep=isinstance(request, Completion))

    def _give_up(self, error: StepTimeout) -> None:
        """On a thread of its own: the engine's hangs."""
        self._estate.abandon(error, self._successor)
        self._unwatch()

    def _unwatch(self) -> None:
        if self._watch is not None:
            self._watch.close()


def _fed(request: Request) -> int:
    """Tokens in its KV cache, for other threads than the engine's, which may be closing its sequence just now."""
    try:
        return request.fed
    except DeviceError:
        return 0


def _token_list(ids: Sequence[int]) -> list[int]:
    return [int(token) for token in ids]


__all__ = ["Engine", "EngineStats", "Generation", "Successor"]
