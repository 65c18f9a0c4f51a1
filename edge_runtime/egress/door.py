"""The door: the one function through which a request leaves this device.

Whoever wants something answered elsewhere comes here. In this order: what must not leave is refused, what should not
leave is replaced, the ledger says what is about to leave and whether the caps allow it, and then it leaves.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx2
import msgspec

from edge_runtime.egress.detectors import Detector, detectors
from edge_runtime.egress.ledger import BILLION, Cap, Ledger, OverCap, Period, Sending, Settlement, most_of
from edge_runtime.egress.openai_body import answer_limit, body_of
from edge_runtime.egress.redaction import Redaction
from edge_runtime.errors import TierUnavailable
from edge_runtime.paths import expanded
from edge_runtime.policy.rules import CostCap, Policy, RemoteTierSpec, TaskClass
from edge_runtime.prompts import TierRequest
from edge_runtime.request import Usage

_log = logging.getLogger("edge_glm.egress")


@dataclass(frozen=True)
class Parcel:
    """A request on its way to a tier. ``request`` identifies it: the same for every attempt."""

    spec: RemoteTierSpec
    key: str | None = field(repr=False)
    task: TaskClass
    request: str
    attempt: int
    content: TierRequest
    until: float
    """Of the loop's clock: when the response must have begun."""
    explain: Callable[[BaseException], str]
    """What sending fails with, in words for the ledger."""


@dataclass
class Delivery:
    """What came back. Whoever reads the response says here what became of it."""

    response: httpx2.Response | None = None
    originals: Mapping[str, str] = field(default_factory=dict)
    """Placeholder → what it stands for; for :class:`edge_runtime.egress.redaction.Restorer`."""
    usage: Usage | None = None
    outcome: str = "cancelled"
    free: bool = False
    """Nothing can have been answered, so that nothing is owed."""


_NOTHING_SENT = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout)


class Door:
    """Belongs to an event loop. ``reach(url)`` says why a URL must not be asked now, or None."""

    def __init__(self, policy: Policy, ledger: Ledger, reach: Callable[[str], str | None]) -> None:
        """PolicyError for a pattern that is none."""
        self._policy = policy
        self._ledger = ledger
        self._reach = reach
        rules = policy.privacy
        self._detectors: Sequence[Detector] = detectors(
            [(each.name, each.regex) for each in rules.patterns], rules.phone_region
        )
        self._clients: dict[str, httpx2.AsyncClient] = {}
        self._settling: set[asyncio.Future[None]] = set()

    @asynccontextmanager
    async def send(self, parcel: Parcel) -> AsyncIterator[Delivery]:
        """Send it and give the response, whose body is still to be read.

        Raises TierUnavailable where privacy, the network or a cost cap forbids it, LedgerError where it cannot be
        written down (and then nothing has left), TimeoutError, and what httpx2 raises.
        """
        spec = parcel.spec
        if parcel.task.privacy == "local-only":
            raise TierUnavailable(f"privacy of class {parcel.task.name} is local-only", spec.name)
        refusal = self._reach(spec.base_url)
        if refusal is not None:
            raise TierUnavailable(refusal, spec.name)
        path, body = body_of(spec, parcel.content)
        delivery = Delivery()
        if parcel.task.privacy == "redact":
            redaction = Redaction(self._detectors)
            body = await asyncio.to_thread(redaction.apply, body)
            delivery.originals = redaction.originals
        data = msgspec.json.encode(body)
        seq = await self._write(parcel, data)
        try:
            request = self._client(spec).build_request(
                "POST", spec.base_url.rstrip("/") + path, content=data, headers=_headers(parcel)
            )
            async with asyncio.timeout_at(parcel.until):
                delivery.response = await self._client(spec).send(request, stream=True)
        except BaseException as error:
            delivery.outcome = parcel.explain(error)
            delivery.free = isinstance(error, _NOTHING_SENT)
            self._settle(seq, parcel, delivery)
            raise
        try:
            yield delivery
        finally:
            self._settle(seq, parcel, delivery)
            await delivery.response.aclose()

    async def close(self) -> None:
        """Settle what is open and close the connections."""
        while self._settling:
            await asyncio.gather(*self._settling, return_exceptions=True)
        for client in self._clients.values():
            await client.aclose()

    async def _write(self, parcel: Parcel, data: bytes) -> int:
        spec, params = parcel.spec, parcel.content.params
        # no tokenizer makes more tokens than there are bytes
        prompt, answer = min(len(data), spec.context), answer_limit(spec, params) * params.n
        most = most_of(spec.price.input, spec.price.output, prompt, answer)
        sending = Sending(
            parcel.request, parcel.attempt, spec.name, parcel.task.name, data, most, self._policy.privacy.ledger_content
        )
        try:
            return await asyncio.to_thread(self._ledger.send, sending, caps_of(self._policy, parcel.task))
        except OverCap as error:
            raise TierUnavailable(str(error), spec.name) from error

    def _settle(self, seq: int, parcel: Parcel, delivery: Delivery) -> None:
        """In the background, so that a cancelled request settles too."""
        spec, usage = parcel.spec, delivery.usage
        response = delivery.response
        if delivery.free:
            cost = 0
        elif usage is not None:
            cost = most_of(spec.price.input, spec.price.output, usage.prompt_tokens, usage.completion_tokens)
        else:
            cost = None
        settlement = Settlement(
            0 if response is None else response.num_bytes_downloaded,
            None if usage is None else usage.prompt_tokens,
            None if usage is None else usage.completion_tokens,
            cost,
            delivery.outcome,
        )
        # no task, which the end of the loop would cancel
        settling = asyncio.get_running_loop().run_in_executor(None, self._ledger.settle, seq, settlement)
        self._settling.add(settling)
        settling.add_done_callback(self._settled)

    def _settled(self, settling: asyncio.Future[None]) -> None:
        self._settling.discard(settling)
        error = settling.exception()
        if error is not None:  # the sending counts with the most that it may have cost
            _log.error("a sending could not be settled: %s", error)

    def _client(self, spec: RemoteTierSpec) -> httpx2.AsyncClient:
        """The tier's, with its connections."""
        client = self._clients.get(spec.name)
        if client is None:
            times = spec.timeouts
            # between pieces of the answer the reader counts the time itself
            timeout = httpx2.Timeout(connect=times.connect, write=times.read, read=None, pool=times.connect)
            context: ssl.SSLContext | bool = True
            if spec.ca_file is not None:
                context = ssl.create_default_context(cafile=str(expanded(spec.ca_file)))
            # a redirect is a failure of the tier: it would take the request, and could take the key, to who knows where
            client = httpx2.AsyncClient(timeout=timeout, verify=context, follow_redirects=False)
            self._clients[spec.name] = client
        return client


def caps_of(policy: Policy, task: TaskClass) -> list[Cap]:
    """Those that hold for a request of the class."""
    return [*_caps(policy.caps, None), *_caps(task.cost_cap, task.name)]


def _caps(cap: CostCap, task_class: str | None) -> list[Cap]:
    limits: dict[Period, float | None] = {"day": cap.day, "month": cap.month}
    return [Cap(period, round(limit * BILLION), task_class) for period, limit in limits.items() if limit is not None]


def _headers(parcel: Parcel) -> dict[str, str]:
    headers = {
        "content-type": "application/json",
        "accept": "text/event-stream",
        "accept-encoding": "identity",  # a few compressed bytes can stand for gigabytes
        "idempotency-key": parcel.request,
        "user-agent": "edge-glm",
    }
    return headers if parcel.key is None else {**headers, "authorization": f"Bearer {parcel.key}"}
