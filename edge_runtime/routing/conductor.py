"""Has a request answered: by the tier that its plan names, or another when that one fails, and by one only.

Everything here runs on the network thread's event loop. Nothing of an answer is passed on before it stands whose it is;
what other tiers have begun meanwhile is cancelled then.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass

from edge_runtime.errors import (
    ContextOverflow,
    DeviceError,
    EdgeError,
    EngineStopped,
    LedgerError,
    Overloaded,
    PromptTooLong,
    TierError,
)
from edge_runtime.policy.rules import TaskClass
from edge_runtime.prompts import TierRequest
from edge_runtime.routing.judge import Judgement, Verdict
from edge_runtime.routing.routed import Call, stamped
from edge_runtime.routing.router import Plan
from edge_runtime.routing.sources import LocalSource, Source, Speeds
from edge_runtime.tiers.model import LocalModel
from edge_runtime.tiers.remote import RemoteRequest, RemoteTier
from edge_runtime.tracing.trace import TIER, Lane, enter, leave, span

_log = logging.getLogger("edge_glm.tiers")
PASSED_ON = (TierError, LedgerError, DeviceError, EngineStopped, Overloaded, PromptTooLong)
"""Failures of a tier after which the next may be asked. Others are the request's own fault."""


@dataclass(frozen=True, eq=False)
class Job:
    """A request, and what was decided on it."""

    call: Call
    request: TierRequest
    prepared: Mapping[str, TierRequest]
    """For every local tier the request as token ids."""
    task: TaskClass
    plan: Plan
    judgement: Judgement
    started: float
    """Of the loop's clock."""
    leaves: bool = False
    """Whether the rest of a local answer may go to whoever asked directly."""


class _NotEnough(Exception):
    """A local answer has begun that is probably not good enough."""

    def __init__(self, source: LocalSource, verdict: Verdict) -> None:
        super().__init__(verdict.reason)
        self.source = source
        self.verdict = verdict


class Conductor:
    """Over the tiers of one policy."""

    def __init__(self, local: Mapping[str, LocalModel], remote: Mapping[str, RemoteTier], speeds: Speeds) -> None:
        self._local = local
        self._remote = remote
        self._speeds = speeds
        self._jobs: set[Job] = set()

    async def idle(self) -> None:
        """Wait until nothing runs."""
        while self._jobs:
            await asyncio.sleep(1.0)

    async def answer(self, job: Job) -> None:
        """Everything of the answer, or its failure, goes to the job's call."""
        call = job.call
        self._jobs.add(job)
        enter(call.lane)  # for this task
        try:
            source = await self._choose(job)
            try:
                await self._pass_on(job, source)
            finally:
                await source.close()
        except asyncio.CancelledError:
            call.cancel()
            raise
        except EdgeError as error:
            call.fail(error)
        except Exception as error:
            _log.exception("a request failed")
            call.fail(EdgeError(f"internal error, {type(error).__name__}: {error}"))
        finally:
            self._jobs.discard(job)

    # --- who answers --------------------------------------------------------------------------------------------------

    async def _choose(self, job: Job) -> Source:
        """The answer to pass on, told to the call. Raises what the last tier failed with."""
        waiting, failures = list(job.plan.order), dict[str, EdgeError]()
        spare: _NotEnough | None = None
        """Kept until another has begun."""
        try:
            while waiting:
                name = waiting.pop(0)
                others = [each for each in waiting if self._may_hedge(job, name, each)]
                try:
                    if others:
                        waiting.remove(others[0])
                        source = await self._race(job, name, others[0], waiting, failures)
                        if source is None:
                            continue
                    else:
                        source = await self._open(job, name, waiting)
                except _NotEnough as doubt:
                    job.call.route.reasons[doubt.source.tier] = doubt.verdict.reason
                    if spare is not None:
                        await spare.source.close()
                    spare = doubt
                except PASSED_ON as error:
                    failures[name] = error
                else:
                    self._decide(job, source, spare, failures)
                    return source
            if spare is None:
                raise _worst(failures)
            source, spare = spare.source, None
            self._decide(job, source, None, failures)
            return source
        finally:
            if spare is not None:
                await spare.source.close()

    def _decide(self, job: Job, source: Source, spare: _NotEnough | None, failures: Mapping[str, EdgeError]) -> None:
        route = job.call.route
        route.reasons |= {name: str(error) for name, error in failures.items()}
        reason = route.reasons.get(source.tier, "") if spare is None else spare.verdict.reason
        if failures:
            reason = told(failures)
            _log.info(
                "%s answers in place of %s: %s", source.tier, ", ".join(failures), reason
            )  # who asked is told, too
            if source.tier in self._local and any(name in self._remote for name in failures):
                route.degraded = reason
        elif job.plan.missing and source.tier in self._local:
            route.degraded = reason = told(job.plan.missing)
        job.call.decide(source.tier, reason)

    def _may_hedge(self, job: Job, first: str, other: str) -> bool:
        return job.task.hedge_ms is not None and (first in self._local) != (other in self._local)

    async def _race(
        self, job: Job, first: str, second: str, after: Sequence[str], failures: dict[str, EdgeError]
    ) -> Source | None:
        """Whichever of two begins first, and is good enough; the other is cancelled. None: both failed. Dean and
        Barroso, The Tail at Scale, 2013: the second is asked ``hedge_ms`` after the first."""
        delay = (job.task.hedge_ms or 0) / 1e3
        tasks = {asyncio.create_task(self._open(job, first, [second, *after])): first}
        doubt: _NotEnough | None = None
        try:
            done, _ = await _wait(tasks, delay)
            if not any(task.exception() is None for task in done):
                tasks[asyncio.create_task(self._open(job, second, [first, *after]))] = second
            while tasks:
                done, _ = await _wait(tasks, None)
                for task in done:
                    try:
                        source = await task
                    except _NotEnough as error:
                        doubt = error
                    except PASSED_ON as error:
                        failures[tasks[task]] = error
                    else:
                        del tasks[task]
                        return source
                    del tasks[task]
            if doubt is None:
                return None
            spare, doubt = doubt, None
            raise spare
        finally:
            if doubt is not None:
                await doubt.source.close()
            await _end(tasks)

    async def _open(self, job: Job, name: str, others: Sequence[str]) -> Source:
        """The tier's answer, begun. _NotEnough where it is local and not good enough, and a remote tier is among
        ``others``; what the tier fails with."""
        lane = None
        if job.call.lane is not None:
            job.call.lane.pause()
            lane = job.call.lane.trace.lane(f"{TIER}{name}")
        token = enter(lane)
        try:
            if name in self._remote:
                with span("upstream"):
                    source: Source = await self._open_remote(job, name)
            else:
                source = await self._open_local(job, name, others, lane)
            source.lane = lane
            return source
        finally:
            leave(token)

    async def _open_local(self, job: Job, name: str, others: Sequence[str], lane: Lane | None) -> Source:
        judged = job.plan.judge and any(other in self._remote for other in others)
        model, prepared = self._local[name], job.prepared[name]
        asked = job.judgement.watched(prepared) if judged else prepared
        source = LocalSource(name, await asyncio.to_thread(model.start, asked))
        if lane is not None:
            lane.pause()
        try:
            if judged:
                job.judgement.begin(model, prepared)
                await self._judge(job, source)
            else:
                await source.hold(0, 0)
                self._measured(job, name)
            return source
        except _NotEnough:
            raise
        except BaseException:
            await source.close()
            raise
        finally:
            job.judgement.end()

    async def _judge(self, job: Job, source: LocalSource) -> None:
        """_NotEnough, if its first words are not."""
        hold, route = job.task.hold, job.call.route
        until = job.started + hold.ms / 1e3
        await source.hold(hold.tokens, until)
        self._measured(job, source.tier)
        with span("judge"):
            verdict = await job.judgement.verdict(source, until)
        route.signals = {**route.signals, **verdict.signals}
        route.good = route.good if verdict.good is None else verdict.good
        if not verdict.enough:
            raise _NotEnough(source, verdict)
        route.reasons[source.tier] = verdict.reason

    async def _open_remote(self, job: Job, name: str) -> Source:
        request = RemoteRequest(job.call.route.request, job.task, job.request)
        source = Source(name, self._remote[name].stream(request))
        try:
            await source.hold(0, 0)
        except BaseException:
            await source.close()
            raise
        self._measured(job, name)
        return source

    def _measured(self, job: Job, name: str) -> None:
        self._speeds.began(name, asyncio.get_running_loop().time() - job.started)

    # --- passing on ---------------------------------------------------------------------------------------------------

    async def _pass_on(self, job: Job, source: Source) -> None:
        if isinstance(source, LocalSource) and job.leaves and job.call.plain and not source.ended:
            await self._hand_over(job, source)
            return
        text = ""
        failure: EdgeError | None = None
        try:
            async with aclosing(source.rest()) as chunks:
                async for chunk in chunks:
                    source.mark("upstream")
                    text += chunk.text
                    if chunk.error is not None:
                        failure = chunk.error
                        break
                    if chunk.finish_reason is not None:
                        self._speeds.ended(source.tier, asyncio.get_running_loop().time() - job.started)
                    job.call.put(stamped(chunk, source.tier), source.usage if chunk.usage is None else chunk.usage)
        except EdgeError as error:
            failure = error
        if failure is None:
            return
        goes_on = self._who_goes_on(job, source)
        if goes_on is None:
            raise failure
        await self._go_on(job, goes_on, text, failure)

    async def _hand_over(self, job: Job, source: LocalSource) -> None:
        """Nothing can change any more: the rest goes from the engine to whoever asked, without a stop here. That spares
        a token two changes of threads."""
        rest = await source.release()
        for chunk in source.held:
            job.call.put(stamped(chunk, source.tier), source.usage)
        if not source.ended:
            job.call.hand_over(rest)

    def _who_goes_on(self, job: Job, source: Source) -> str | None:
        """The local tier that goes on where a remote answer breaks off."""
        if source.tier in self._local or job.task.broken_stream != "continue" or job.request.params.n > 1:
            return None
        return next((name for name in job.plan.order if name in self._local), None)

    async def _go_on(self, job: Job, name: str, text: str, failure: EdgeError) -> None:
        """With a local model, from the text so far."""
        model, route = self._local[name], job.call.route
        try:
            request = await asyncio.to_thread(model.go_on, job.prepared[name], text)
            generation = await asyncio.to_thread(model.start, request)
        except EdgeError as error:
            raise failure from error
        route.continued = f"{name} went on after {len(text)} characters: {failure}"
        _log.info("%s", route.continued)
        source = LocalSource(name, generation)
        try:
            async with aclosing(source.rest()) as chunks:
                async for chunk in chunks:
                    if chunk.error is not None:
                        raise failure from chunk.error
                    job.call.put(stamped(chunk, name), source.usage)
        finally:
            await source.close()


def _worst(failures: Mapping[str, EdgeError]) -> EdgeError:
    """What to tell where every tier has failed: the only failure, or all in one."""
    errors = list(failures.values())
    if len(errors) == 1:
        return errors[0]
    if errors and all(isinstance(error, PromptTooLong | ContextOverflow) for error in errors):
        return errors[-1]
    return TierError(f"no tier has answered: {told(failures)}", list(failures)[-1])


def told(reasons: Mapping[str, object]) -> str:
    """Of several tiers; each is named once."""
    texts = {name: str(reason) for name, reason in reasons.items()}
    return "; ".join(text if text.startswith(f"{name} ") else f"{name}: {text}" for name, text in texts.items())


async def _wait(
    tasks: Mapping[asyncio.Task[Source], str], timeout: float | None
) -> tuple[set[asyncio.Task[Source]], set[asyncio.Task[Source]]]:
    return await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)


async def _end(tasks: Mapping[asyncio.Task[Source], str]) -> None:
    """Cancel them, and close what they have opened all the same."""
    for task in tasks:
        task.cancel()
    for task in tasks:
        with suppress(asyncio.CancelledError, Exception):
            try:
                source = await task
            except _NotEnough as doubt:
                source = doubt.source
            await source.close()
