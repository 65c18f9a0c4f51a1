"""One engine takes another's place: its device has failed, or somebody wants another in its stead."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

from edge_runtime.completion import Request
from edge_runtime.errors import EdgeError, EngineError, EngineStopped
from edge_runtime.inbox import Inbox, Letter
from edge_runtime.submission import Submission

if TYPE_CHECKING:
    from edge_runtime.engine import Engine

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


class Succession:
    """Of an engine: who is to take its place, and how those who wait come to that."""

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox
        self.wanted: Open | None = None
        """What opens the engine that shall take this one's place, once what has been begun is over."""
        self._done: Future[None] = Future()

    def ask(self, open_successor: Open) -> None:
        """As :meth:`edge_runtime.engine.Engine.replace`."""
        if self.wanted is not None:
            raise ValueError("another engine is to take over already")
        self.wanted = open_successor
        self._inbox.wake()
        self._done.result()

    def hand_over(self, end: HandOver, unsent: Sequence[Submission]) -> None:
        """Have the successor answer ``unsent`` and what is in the inbox. Where none opens, all are told."""
        error = EngineStopped(f"{end}, and another has taken over")
        successor = None
        try:
            successor = end.open_successor()
        except BaseException as cause:  # whatever it is, somebody waits
            error = EngineStopped(f"{end}, and nothing takes its place: {cause}")
            error.__cause__ = cause
        waiting = [*unsent, *(letter.submission for letter in self._inbox.stop(error))]
        if successor is not None and end.error is None:
            self._done.set_result(None)
        else:
            self._done.set_exception(error.__cause__ or error)
        if successor is not None:
            successor.resume(waiting)
            return
        for submission in waiting:
            submission.fail(error)

    def none(self, error: EngineStopped) -> list[Request]:
        """The engine ends without one; returns what it has not taken."""
        unread = [request for letter in self._inbox.stop(error) for request in letter.requests]
        self._done.set_exception(error)
        return unread
