"""One batch through the decoder, and what its requests make of the logits."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from devices.base import Forward
from devices.stopwatch import Stopwatch
from edge_runtime.completion import Completion, Request
from edge_runtime.drafting.draft_model import DraftModel
from edge_runtime.errors import EdgeError, EngineError, OutOfKVCache
from edge_runtime.recovery import Recovery
from edge_runtime.scheduler import Scheduler, Work

_log = logging.getLogger("edge_glm.engine")


class Steps:
    """Of one engine; belongs to its thread. Others may read the counts."""

    def __init__(self, forward: Forward, scheduler: Scheduler, recovery: Recovery, drafter: DraftModel | None) -> None:
        """``forward``: the decoder's, as the engine calls it."""
        self._run_decoder = forward
        self._scheduler = scheduler
        self._recovery = recovery
        self._drafter = drafter
        self._without_numbers: dict[Request, EngineError] = {}
        """Requests of the step that has just been run, and what is wrong with their logits."""
        self.prefilled = 0
        """Tokens of prompts."""
        self.generated = 0
        self.drafted = 0
        self.accepted = 0
        """Of the drafted tokens, those that held."""
        self.forwarding = Stopwatch()

    def run(self, batch: list[Work]) -> None:
        """HandOver, DeviceError of a sequence, and whatever a step that hangs is given up with."""
        self._postprocess(*self._forward(batch))  # keeps no logits: the next take their place

    def _forward(self, batch: list[Work]) -> tuple[list[Work], list[NDArray[np.float32]]]:
        while batch:
            try:
                before, started = self.forwarding.seconds, time.perf_counter_ns()
                with self.forwarding:
                    results = self._run_decoder([work.step for work in batch])
                ended = time.perf_counter_ns()
                for work in batch:
                    if work.request.lane is not None:
                        work.request.lane.stepped(work.part, started, ended)
                if self._drafter is not None:
                    self._drafter.saw([work.step for work in batch], self.forwarding.seconds - before)
                self._recovery.went_well()
                return batch, results
            except OutOfKVCache as error:
                batch = self._scheduler.make_room(batch, error)
            except Exception as error:  # the batch's sequences are undefined now, the others are sound
                self._recovery.failed([work.request for work in batch], error)
                batch = []
        return [], []

    def _postprocess(self, batch: list[Work], results: list[NDArray[np.float32]]) -> None:
        self._without_numbers.clear()  # a step before may have ended in the middle
        for work, logits in zip(batch, results, strict=True):
            request = work.request
            if work.start < request.prompt_length:
                self.prefilled += min(len(work.step.tokens), request.prompt_length - work.start)
            before = len(request.tokens)
            if request.lane is not None:
                request.lane.mark("batch")
            self._take(request, logits, work.draft)
            if work.by_model and self._drafter is not None:
                self._drafter.pace.fared(len(work.draft), max(len(request.tokens) - before - 1, 0))
            if request in self._without_numbers:
                continue
            if isinstance(request, Completion) and request.siblings and len(logits):
                siblings, request.siblings = request.siblings, []
                for sibling in siblings:
                    if request.lane is not None:
                        sibling.lane = request.lane.trace.lane(f"completion {sibling.index}")
                    if self._scheduler.fork(request, sibling):
                        self._take(sibling, logits)
        now = time.perf_counter_ns()
        for request in self._scheduler.running:
            if request.lane is not None and not request.finished:
                request.lane.step_over(now)
        if self._without_numbers:
            broken, self._without_numbers = self._without_numbers, {}
            self._recovery.gave_no_numbers(broken, [work.request for work in batch if work.step.rows])

    def _take(self, request: Request, logits: NDArray[np.float32], draft: Sequence[int] = ()) -> None:
        before = len(request.tokens)
        try:
            request.take(logits, draft)
        except EngineError as error:
            self._without_numbers[request] = error
            return
        except EdgeError as error:  # such as of a grammar that has become too complex
            self._fail(request, error)
            return
        except Exception as error:  # a bug that this answer has met; the others go on
            _log.exception("an answer could not go on")
            failure = EngineError(f"the answer could not go on: {type(error).__name__}: {error}")
            failure.__cause__ = error
            self._fail(request, failure)
            return
        new = len(request.tokens) - before
        self.generated += new
        if draft:
            self.drafted += len(draft)
            self.accepted += new - 1
            if request.sequence is not None:
                request.sequence.crop(len(request.tokens) - 1)  # a device may keep less: it is fed again

    def _fail(self, request: Request, error: EdgeError) -> None:
        request.finish("error", error)
        self._scheduler.release(request, keep=False)
