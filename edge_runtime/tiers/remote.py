"""A tier elsewhere: another edge-glm, or any OpenAI-compatible endpoint. Timeouts, retries and a circuit breaker."""

from __future__ import annotations

import asyncio
import os
import random
import ssl
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2
import msgspec
from msgspec.structs import replace

from edge_runtime.egress.door import Delivery, Door, Parcel
from edge_runtime.egress.openai_body import unsupported
from edge_runtime.egress.redaction import ChunkRestorer
from edge_runtime.errors import LedgerError, TierError, TierFailed, TierRefused, TierUnavailable
from edge_runtime.heartbeat import HEARTBEAT
from edge_runtime.policy.rules import RemoteTierSpec, TaskClass
from edge_runtime.prompts import Fit, TierRequest
from edge_runtime.request import Chunk
from edge_runtime.tiers.breaker import Breaker
from edge_runtime.tiers.openai_events import Broken, EventParser, Nonsense, message_of

AFTERWARDS_S = 2.0
"""So long a whole answer waits for its usage and ``[DONE]``."""
SLEPT_S = 1.0
"""Where this process has slept for so long during an attempt, its failure says nothing of the tier."""
MAX_ERROR = 64 * 1024
"""Bytes of an error body that are read."""
MAX_ANSWER = 64 * 2**20
"""Bytes of an answer: thirty times what a million tokens take as events of OpenAI's."""
LONGEST_PAUSE_S = 86_400.0
"""That a server can ask for: no answer puts its tier aside for good."""
ANSWERED = "answered"
_TRY_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_NO_ENTRY = frozenset({401, 402, 403, 407})


class _Attempt(Exception):
    """An attempt failed before anything of the answer had come."""

    def __init__(self, error: TierError, again: bool) -> None:
        super().__init__(str(error))
        self.error = error
        self.again = again


@dataclass(frozen=True)
class RemoteRequest:
    """``id``: the same for all attempts at one request, wherever they are made."""

    id: str
    task: TaskClass
    content: TierRequest


class RemoteTier:
    """Belongs to an event loop; :attr:`refusal`, :meth:`fit` and :meth:`unsupported` may be asked from any thread."""

    def __init__(
        self,
        spec: RemoteTierSpec,
        key: str | None,
        door: Door,
        reach: Callable[[str], str | None],
        breaker: Breaker | None = None,
    ) -> None:
        rule = spec.breaker
        self.spec = spec
        self.breaker = breaker or Breaker(rule.failures, rule.cooldown, rule.longest)
        self._key = key
        self._door = door
        self._reach = reach

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def refusal(self) -> str | None:
        """Why it would not be asked now; None: it would."""
        return self._reach(self.spec.base_url) or self.breaker.refusal

    def unsupported(self, request: TierRequest) -> str | None:
        """Why it cannot take the request, whenever; None: it can."""
        return unsupported(self.spec, request)

    def fit(self, prompt_tokens: int) -> Fit:
        """By the local tokenizer's count, which is near."""
        return Fit(prompt_tokens, self.spec.context, self.spec.context)

    async def stream(self, request: RemoteRequest) -> AsyncGenerator[Chunk]:
        """The answer as it comes; its last chunk has the usage, if the server says it.

        Before the first chunk what fails is tried again, as the tier's ``retry`` says. Time that this process has slept
        through (a suspended machine) is not the tier's, nor are connections that died meanwhile. Closing it cancels the
        request. Raises TierUnavailable, TierRefused, TierFailed, LedgerError; TierFailed also in mid-answer.
        """
        deadline, slept = _now() + self.spec.timeouts.total, HEARTBEAT.slept
        for attempt in range(1, self.spec.retry.attempts + 1):
            try:
                async with aclosing(self._attempt(request, attempt, deadline)) as chunks:
                    async for chunk in chunks:
                        yield chunk
                return
            except _Attempt as failure:
                slept_before, slept = slept, HEARTBEAT.slept
                deadline += slept - slept_before
                wait = self._wait(failure.error, attempt)
                if not failure.again or attempt == self.spec.retry.attempts or _now() + wait > deadline:
                    raise failure.error from failure.__cause__
                refusal = self.breaker.refusal
                if refusal is not None:
                    raise failure.error from failure.__cause__
                await asyncio.sleep(wait)

    def _wait(self, error: TierError, attempt: int) -> float:
        """Seconds before the next attempt; endless where the server asks for more than is worth waiting."""
        asked = error.retry_after if isinstance(error, TierFailed) else None
        if asked is not None:
            return asked if asked <= self.spec.retry.longest else float("inf")
        return random.uniform(0, min(self.spec.retry.longest, self.spec.retry.base * 2**attempt))

    async def _attempt(self, request: RemoteRequest, attempt: int, deadline: float) -> AsyncGenerator[Chunk]:
        """_Attempt before the first chunk, TierFailed after it."""
        refusal = self.breaker.enter()
        if refusal is not None:
            raise _Attempt(TierUnavailable(refusal, self.name), False)
        began, told, slept = False, False, HEARTBEAT.slept
        try:
            async with aclosing(self._answer(request, attempt, deadline)) as chunks:
                async for chunk in chunks:
                    if not began:
                        began = told = True
                        self.breaker.succeeded()
                    yield chunk
        except TierFailed as error:
            if HEARTBEAT.slept - slept < SLEPT_S:
                told = True
                self.breaker.failed(str(error), error.retry_after)
            if began:
                raise
            raise _Attempt(error, getattr(error, "again", True)) from error.__cause__
        except TierRefused as error:
            told = True
            self.breaker.succeeded()  # it is well enough to say no
            raise _Attempt(error, False) from error.__cause__
        except TierUnavailable as error:
            raise _Attempt(error, False) from error.__cause__
        finally:
            if not told:
                self.breaker.left()

    async def _answer(self, request: RemoteRequest, attempt: int, deadline: float) -> AsyncGenerator[Chunk]:
        """Of one attempt. TierFailed, TierRefused, TierUnavailable, LedgerError."""
        first = min(_now() + self.spec.timeouts.first_token, deadline)

        def explain(error: BaseException) -> str:
            return str(self._translated(error, deadline, begun=False) or "cancelled")

        parcel = Parcel(self.spec, self._key, request.task, request.id, attempt, request.content, first, explain)
        begun = False
        try:
            async with self._door.send(parcel) as delivery:
                try:
                    async for chunk in self._chunks(request, delivery, first, deadline):
                        begun = True
                        yield chunk
                except BaseException as error:
                    if delivery.outcome != ANSWERED:  # else whoever asked has left with the last piece
                        delivery.outcome = str(self._translated(error, deadline, begun) or "cancelled")
                    raise
        except Exception as error:
            failure = self._translated(error, deadline, begun)
            if failure is None or failure is error:
                raise
            raise failure from error

    async def _chunks(
        self, request: RemoteRequest, delivery: Delivery, first: float, deadline: float
    ) -> AsyncGenerator[Chunk]:
        response, times = delivery.response, self.spec.timeouts
        assert response is not None
        encoding = response.headers.get("content-encoding", "identity")
        if encoding.strip().lower() != "identity":
            delivery.free = response.status_code != 200
            raise _Final(f"{self.name} compresses its answers ({encoding[:40]}), which it was asked not to", self.name)
        if response.status_code != 200:
            async with asyncio.timeout_at(first):
                raise await self._refused(delivery)
        parser = EventParser(self.name, request.content.params.n, self._key)
        restorer = ChunkRestorer(delivery.originals, as_json=request.content.wants_json)
        last: Chunk | None = None
        due = first
        events = aiter(httpx2.EventSource(response))
        while not parser.done:
            if response.num_bytes_downloaded > MAX_ANSWER:
                raise Nonsense(f"more than {MAX_ANSWER} bytes")
            try:
                async with asyncio.timeout_at(min(due, deadline)):
                    event = await anext(events, None)
            except (TimeoutError, httpx2.HTTPError):
                if not parser.complete:
                    raise
                break  # the answer is whole; only its usage or [DONE] is missing
            if event is None:
                break
            for chunk in parser.add(event.data):
                for restored in restorer.add(chunk):
                    if last is not None:
                        yield last
                    last = restored
                    due = _now() + (min(times.read, AFTERWARDS_S) if parser.complete else times.read)
                    if restored.finish_reason is None:
                        yield restored
                        last = None
        if not parser.complete:
            raise Broken("the stream ended before the answer did")
        assert last is not None
        delivery.usage, delivery.outcome = parser.usage, ANSWERED
        yield replace(last, usage=parser.usage)

    async def _refused(self, delivery: Delivery) -> TierError:
        """An answer that is none."""
        response = delivery.response
        assert response is not None
        delivery.free = True
        status = response.status_code
        body = b""
        async for piece in response.aiter_bytes():
            body += piece
            if len(body) > MAX_ERROR:
                break
        try:
            said: Any = msgspec.json.decode(body)
        except (msgspec.DecodeError, RecursionError):
            said = body[:200].decode(errors="replace")
        text = f"{self.name} answers {status}: {message_of(said, self._key) or 'nothing more'}"
        if status in _TRY_AGAIN:
            return TierFailed(text, self.name, _retry_after(response))
        if status in _NO_ENTRY or status >= 500 or status < 400:
            return _Final(text, self.name)
        return TierRefused(text, self.name, status)

    def _translated(self, error: BaseException, deadline: float, begun: bool) -> TierError | LedgerError | None:
        """What went wrong, in our terms; None: it was cancelled, or is a bug."""
        name, times = self.name, self.spec.timeouts
        if isinstance(error, TierError | LedgerError):
            return error
        if isinstance(error, TimeoutError):
            if _now() >= deadline:
                return TierFailed(f"{name} did not finish within {times.total:g} s", name)
            if begun:
                return TierFailed(f"{name} stalled: nothing came for {times.read:g} s", name)
            return TierFailed(f"{name} did not answer within {times.first_token:g} s", name)
        if isinstance(error, httpx2.ConnectTimeout | httpx2.PoolTimeout):
            return TierFailed(f"{name} could not be reached within {times.connect:g} s", name)
        if isinstance(error, httpx2.ConnectError):
            cause = _root(error)
            if isinstance(cause, ssl.SSLError):
                return _Final(f"{name} has no certificate that is trusted: {_words(cause)}", name)
            return TierFailed(f"{name} cannot be reached: {_words(cause)}", name)
        if isinstance(error, httpx2.SSEError):
            return TierFailed(f"{name} sent nonsense: {_words(error)}", name)
        if isinstance(error, httpx2.HTTPError):
            return TierFailed(f"{name} broke off: {_words(error)}", name)
        if isinstance(error, Nonsense):
            return TierFailed(f"{name} sent nonsense: {error}", name)
        if isinstance(error, Broken):
            return TierFailed(f"{name}: {error}", name)
        if isinstance(error, UnicodeError):  # of the encoding that its headers name
            return TierFailed(f"{name} sent nonsense: {_words(error)}", name)
        return None


class _Final(TierFailed):
    """Trying again at once would change nothing."""

    again = False


def _now() -> float:
    """By the running loop's clock."""
    return asyncio.get_running_loop().time()


def _retry_after(response: httpx2.Response) -> float | None:
    """Seconds (RFC 9110, section 10.2.3: a number or a date, which is by the server's clock; ours may be wrong)."""
    value = response.headers.get("retry-after", "").strip()
    try:
        seconds = float(value)
    except ValueError:
        try:
            now = _seconds(response.headers["date"]) if "date" in response.headers else time.time()
            seconds = _seconds(value) - now
        except (TypeError, ValueError, OverflowError):
            return None
    return min(max(0.0, seconds), LONGEST_PAUSE_S)


def _seconds(date: str) -> float:
    """Unix time. TypeError, ValueError, OverflowError."""
    return parsedate_to_datetime(date).timestamp()


def _root(error: BaseException) -> BaseException:
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return error


def _words(error: BaseException) -> str:
    """In a line; of the system's errors what the system calls them."""
    if isinstance(error, OSError) and not isinstance(error, ssl.SSLError) and error.errno is not None:
        return os.strerror(error.errno) if error.errno > 0 else str(error.strerror)
    return " ".join(str(error).split())[:200] or type(error).__name__
