"""How an engine ends: another takes its place, because its device has failed or somebody wants it replaced, or none."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TYPE_CHECKING

from devices.base import Decoder
from edge_runtime.completion import Request
from edge_runtime.drafting.draft_model import DraftModel
from edge_runtime.errors import EdgeError, EngineError, EngineStopped, StepTimeout
from edge_runtime.inbox import CLOSED, Inbox, Letter
from edge_runtime.prefix_cache import PrefixCache
from edge_runtime.scheduler import Scheduler
from edge_runtime.submission import Submission

if TYPE_CHECKING:
    from edge_runtime.engine import Engine

_log = logging.getLogger("edge_glm.engine")
Open = Callable[[], "Engine"]
Successor = Callable[[EngineError], Open | None]
"""Asked when the device has failed: what opens another engine, once this one has let go of its device. None: there is
none, and this engine goes on as well as it can."""


class HandOver(Exception):
    """There is somebody to hand over to."""

    def __init__(self, why: str, open_successor: Open, error: EngineError | None = None) -> None:
        """``error``: what those get who have had something already; None: there are none."""
        super().__init__(why)
        self.open_successor = open_successor
        self.error = error


class InHand:
    """Requests that an engine has taken and not let go yet: each is running, or waiting, or waits for a sibling.

    Belongs to the engine's thread; others may ask whether there are any.
    """

    def __init__(self) -> None:
        self._submissions: dict[Request, Submission] = {}

    def __len__(self) -> int:
        return len(self._submissions)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._submissions)

    def take(self, letter: Letter) -> None:
        self._submissions.update(dict.fromkeys(letter.requests, letter.submission))

    def drop(self, request: Request) -> None:
        del self._submissions[request]

    def drop_finished(self) -> list[Request]:
        """Returns them."""
        finished = [request for request in self._submissions if request.finished]
        for request in finished:
            self.drop(request)
        return finished

    def not_begun(self, running: Collection[Request]) -> list[Letter]:
        """What could be asked of another engine without anybody's work being lost."""
        begun = {self._submissions[request] for request in running}
        whole = [each for each in self._unsent() if each not in begun]
        return [Letter(each, [request for request, of in self._submissions.items() if of is each]) for each in whole]

    def end_begun(self, error: EdgeError | None) -> list[Submission]:
        """End, with ``error``, whatever had something sent; returns what had not. Nothing is in hand then."""
        unsent = self._unsent()
        for request, submission in self._submissions.items():
            if submission.sent:
                request.finish("error", error)
        self._submissions.clear()
        return unsent

    def end(self, error: EdgeError) -> None:
        """End all."""
        for request in self._submissions:
            request.finish("error", error)
        self._submissions.clear()

    def _unsent(self) -> list[Submission]:
        return [each for each in dict.fromkeys(self._submissions.values()) if not each.sent]


class Estate:
    """What an engine has, and who gets it, whichever way it ends."""

    def __init__(
        self, decoder: Decoder, drafter: DraftModel | None, scheduler: Scheduler, cache: PrefixCache, inbox: Inbox
    ) -> None:
        self.live = InHand()
        self.wanted: Open | None = None
        """What opens the engine that shall take this one's place, once what has been begun is over."""
        self.failure: str | None = None
        """Why nobody answers any more, if nobody has wanted that."""
        self.settled = threading.Event()
        """All who waited have been told, or have been handed over."""
        self._decoder = decoder
        self._drafter = drafter
        self._scheduler = scheduler
        self._cache = cache
        self._inbox = inbox
        self._replaced: Future[None] = Future()

    # --- any thread ---------------------------------------------------------------------------------------------------

    def replace(self, open_successor: Open) -> None:
        """As :meth:`edge_runtime.engine.Engine.replace`."""
        if self.wanted is not None:
            raise ValueError("another engine is to take over already")
        self.wanted = open_successor
        self._inbox.wake()
        self._replaced.result()

    # --- the engine's thread ------------------------------------------------------------------------------------------

    def put_back(self) -> None:
        """Who only waits yet, waits for the successor."""
        letters = self.live.not_begun(self._scheduler.running)
        self._inbox.put_back(letters)
        for request in [request for letter in letters for request in letter.requests]:
            self.live.drop(request)
            self._scheduler.release(request, keep=False)

    def hand_over(self, end: HandOver) -> None:
        """Let go of the device, then have the successor answer what nobody has had anything of; end the rest."""
        try:
            unsent = self.live.end_begun(end.error)
            self._scheduler.forget()
            self._close_device()
            self._pass_on(end, unsent)
        finally:
            self.settled.set()

    def close(self, error: EngineStopped) -> None:
        """All end with ``error``."""
        try:
            self._end_all(error)
            self._close_device()
        finally:
            self.settled.set()

    # --- another thread, since the engine's hangs in the decoder ------------------------------------------------------

    def abandon(self, error: StepTimeout, successor: Successor) -> None:
        """Hand over, or end all, without the device. Should the thread come back, :meth:`close_late` is left to it."""
        _log.error("%s", error)
        open_successor = None
        if not self._inbox.closing:
            try:
                open_successor = successor(error)
            except Exception:  # somebody waits
                _log.exception("nobody knows what could take over")
        try:
            if open_successor is not None:
                unsent = self.live.end_begun(error)
                self._scheduler.forget()
                self._cache.abandon()
                self._pass_on(HandOver(str(error), open_successor, error), unsent)
            else:
                if not self._inbox.closing:
                    self.failure = f"{error}, and no other device can take over: start the program anew"
                self._end_all(EngineStopped(self.failure or CLOSED))
                self._cache.abandon()
        finally:
            self.settled.set()

    def close_late(self) -> None:
        """The engine's thread has come back after all, and nothing but the decoder is its own any more."""
        _log.warning("%s has come back, and is closed", self._decoder.device)
        self._close_decoders()

    # --- inside -------------------------------------------------------------------------------------------------------

    def _pass_on(self, end: HandOver, unsent: Sequence[Submission]) -> None:
        """Have the successor answer ``unsent`` and what is in the inbox. Where none opens, all are told."""
        error = EngineStopped(f"{end}, and another has taken over")
        successor = None
        try:
            successor = end.open_successor()
        except BaseException as cause:  # whatever it is, somebody waits
            error = EngineStopped(f"{end}, and nothing takes its place: {cause}")
            error.__cause__ = cause
            self.failure = str(error)
        waiting = [*unsent, *(letter.submission for letter in self._inbox.stop(error))]
        if successor is not None and end.error is None:
            self._replaced.set_result(None)
        else:
            self._replaced.set_exception(error.__cause__ or error)
        if successor is not None:
            successor.resume(waiting)
            return
        for submission in waiting:
            submission.fail(error)

    def _end_all(self, error: EngineStopped) -> None:
        for letter in self._inbox.stop(error):
            for request in letter.requests:
                request.finish("error", error)
        self._replaced.set_exception(error)
        self.live.end(error)
        self._scheduler.forget()

    def _close_device(self) -> None:
        with self._at_the_end():
            self._cache.close()
        self._close_decoders()

    def _close_decoders(self) -> None:
        with self._at_the_end():
            if self._drafter is not None:
                self._drafter.close()
        with self._at_the_end():
            self._decoder.close()  # its sequences die with it

    @contextmanager
    def _at_the_end(self) -> Iterator[None]:
        """Whatever is raised is only said: a device may have failed already, and somebody waits for the rest."""
        try:
            yield
        except Exception as error:
            _log.warning("closing %s: %s: %s", self._decoder.device, type(error).__name__, error)
