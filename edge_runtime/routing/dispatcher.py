"""Where requests meet the policy: each is given to the tier that should answer it, under the policy as it stands."""

from __future__ import annotations

import asyncio
import logging
import threading
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from dataclasses import replace as replace_field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from msgspec.structs import replace

from edge_runtime.deferred.answers import Done, joined
from edge_runtime.deferred.deferrals import Deferrals
from edge_runtime.egress.ledger import Ledger
from edge_runtime.errors import EdgeError, PolicyError, TierUnavailable
from edge_runtime.facts import Facts
from edge_runtime.generation import EngineGeneration, Generation
from edge_runtime.paths import Home
from edge_runtime.policy.rules import LocalTierSpec, TaskClass, read_policy
from edge_runtime.prompts import Messages, TierRequest
from edge_runtime.route import Route
from edge_runtime.routing.conductor import PASSED_ON, Job, told
from edge_runtime.routing.regime import Regime
from edge_runtime.routing.routed import Call, RoutedGeneration
from edge_runtime.routing.router import Candidate, Plan, Router
from edge_runtime.routing.sources import Speeds
from edge_runtime.stages.protocols import Conversation
from edge_runtime.tiers.model import LocalModel
from edge_runtime.tiers.network import Canceller, NetworkThread, Reach
from edge_runtime.tracing.trace import current, span

_log = logging.getLogger("edge_glm.policy")
GRACE_S = 30.0
"""So long what a policy has open outlives it at least: a request may have been decided under it just now."""


@dataclass(frozen=True)
class Decision:
    """On one request, before anything has run."""

    regime: Regime
    facts: Facts
    signals: Mapping[str, float]
    task: TaskClass
    prepared: Mapping[str, TierRequest]
    candidates: list[Candidate]
    plan: Plan
    route: Route


class Beside(Protocol):
    """A model that is opened beside the first; :class:`edge_runtime.EdgeLLM` is one."""

    local: LocalModel

    def close(self) -> None: ...


class Dispatcher:
    """The policy in the file ``path``, over the ``model`` that was opened. Methods may be called from any thread.

    The file is looked at before every request; a version that cannot be used is logged, and the one before stays in
    force. PolicyError if the first cannot be used; LedgerError if the ledger is none. On a disk that is full or
    read-only local tiers answer, and nothing leaves the device.
    """

    def __init__(
        self, path: Path, model: LocalModel, open_beside: Callable[[LocalTierSpec], Beside], home: Home, offline: bool
    ) -> None:
        """``home`` has the ledger and the queue of deferred requests; ``open_beside`` opens the model of a local tier
        that names one, which is closed with the dispatcher."""
        self._path = path
        self._model = model
        self._open_beside = open_beside
        self._beside: dict[LocalTierSpec, Beside] = {}
        self._lock = threading.Lock()
        """Held while a version of the policy is read."""
        self._seen: tuple[int, ...] = ()
        self._problem: str | None = None
        self._reach = Reach(offline)
        self._speeds = Speeds()
        self._ledger = Ledger(home.ledger, patient=True)
        if self._ledger.problem is not None:  # what is answered here needs none
            _log.error("nothing leaves this device: %s", self._ledger.problem)
        self._network = NetworkThread()
        self._retired: list[Regime] = []
        self._deferrals: Deferrals | None = None
        try:
            self._seen = _version_of(path)
            self._regime = self._build(None)
            self._deferrals = Deferrals(
                home.deferred, self._network.loop, self._answer_deferred, lambda: self._regime.policy.deferred
            )
        except BaseException:
            self._network.close()
            self._close_here()
            raise

    @property
    def problem(self) -> str | None:
        """Why the file as it is now is not in force; None: it is."""
        return self._problem

    def start(self, request: TierRequest) -> Generation:
        """As :meth:`edge_runtime.tiers.model.LocalModel.start`, and TierUnavailable where no tier may be asked."""
        with span("route"):
            decision = self.decide(request)
        plan, route, local = decision.plan, decision.route, decision.regime.local
        if not plan.order:
            raise Router.refusal(request.params, decision.task, decision.candidates, plan)
        first = plan.order[0]
        plain = not (plan.judge or plan.missing or decision.regime.judge.stages.filters)
        if first in local and plain and decision.task.hedge_ms is None:
            try:
                generation = local[first].start(decision.prepared[first])
            except PASSED_ON:
                if len(plan.order) == 1:
                    raise
            else:
                if isinstance(generation, EngineGeneration):
                    route.tier, route.reason = first, plan.reasons[first]
                    generation.routed(route)
                return generation
        return self._conduct(decision)

    @property
    def deferrals(self) -> Deferrals:
        assert self._deferrals is not None
        return self._deferrals

    def defers(self, request: TierRequest) -> bool:
        """Whether a request is to be answered later, by its own wish or its class's. TemplateError, InvalidRequest."""
        classes = self._current().policy.classes
        if request.about.deferred or not any(task.mode == "deferred" for task in classes):
            return request.about.deferred
        return self.decide(request).task.mode == "deferred"

    def decide(self, request: TierRequest) -> Decision:
        """What would be done with a request. TemplateError, InvalidRequest."""
        regime = self._current()
        decision = self._decide(regime, request)
        shorter = None if decision.plan.order else self._shortened(regime, decision)
        if shorter is None:
            return decision
        left_out = len(decision.facts.messages) - len(shorter)
        decision = self._decide(regime, replace_field(request, prompt=Messages(shorter)))
        decision.route.reasons["context"] = f"{left_out} messages were left out, as the policy's stages allow"
        return decision

    def _decide(self, regime: Regime, request: TierRequest) -> Decision:
        request = replace_field(request, decoding=regime.judge.stages.decoding)
        return self.weigh(regime, request, self._model.prepare(request))

    def weigh(self, regime: Regime, request: TierRequest, prepared: TierRequest) -> Decision:
        """Class, signals and plan of a request; ``prepared``: the same as token ids."""
        facts = Facts(request, len(prepared.ids))
        matched = regime.matcher(facts)
        prepared_for = regime.prepared(request, {self._model: prepared}, matched.task)
        candidates = regime.candidates(request, prepared_for, facts.tokens, matched.task)
        signals = regime.judge.stages.signals(facts)
        estimate = regime.judge.estimate(signals)
        plan = Router.choose(request.params, matched.task, candidates, estimate)
        reasons = dict(plan.reasons)
        name = f"req-{uuid.uuid4().hex}"
        route = Route(name, matched.task.name, matched.because, plan.order, reasons, signals=signals)
        route.good = None if estimate is None else estimate.good
        route.wanted_ttft_ms, route.wanted_total_ms = matched.task.latency.ttft, matched.task.latency.total
        return Decision(regime, facts, signals, matched.task, prepared_for, candidates, plan, route)

    def _shortened(self, regime: Regime, decision: Decision) -> Conversation | None:
        """The conversation as the stages would have it, where it is too long for every tier."""
        request = decision.facts.request
        room = max((each.fit.max_context for each in decision.candidates), default=0)
        asked = 1 if request.params.max_tokens is None else request.params.max_tokens
        room = min(room - asked, max((each.fit.max_prompt for each in decision.candidates), default=0))
        if decision.facts.tokens <= room or not isinstance(request.prompt, Messages):
            return None

        def count(messages: Conversation) -> int:
            return len(self._model.prepare(replace_field(request, prompt=Messages(messages))).ids)

        return regime.judge.stages.shorten(request.prompt.messages, count, room)

    def health(self) -> dict[str, Any]:
        """For /health."""
        regime = self._current()
        told: dict[str, Any] = {"tiers": regime.states()}
        if regime.judge.stages.aside:
            told["stages aside"] = dict(regime.judge.stages.aside)
        return told if self._problem is None else {**told, "policy": self._problem}

    def close(self) -> None:
        """End every request and close what leads elsewhere. Idempotent."""
        regimes = [self._regime, *self._retired]

        async def close() -> None:
            for regime in regimes:
                await regime.door.close()

        self._network.close(close)
        self._close_here()

    def _close_here(self) -> None:
        if self._deferrals is not None:
            self._deferrals.close()
        self._ledger.close()
        for each in self._beside.values():
            each.close()

    # --- the policy ---------------------------------------------------------------------------------------------------

    def _current(self) -> Regime:
        """By the file as it is now, if it can be used."""
        try:
            version = _version_of(self._path)
        except PolicyError as error:
            self._complain(error)
            return self._regime
        if version != self._seen:
            with self._lock:
                if version != self._seen:
                    self._seen = version
                    self._reload()
        return self._regime

    def _reload(self) -> None:
        try:
            fresh = self._build(self._regime)
        except EdgeError as error:
            self._complain(error)
            return
        old = self._regime
        self._retired.append(old)
        self._regime, self._problem = fresh, None
        Canceller(self._network.loop).start(self._retire(old))
        _log.info("the policy %s was read anew and is in force", self._path)

    async def _retire(self, regime: Regime) -> None:
        """Close what an old version of the policy has open, once nobody can be using it."""
        await asyncio.sleep(GRACE_S)
        await regime.conductor.idle()
        await regime.door.close()
        self._retired.remove(regime)
        used = {model for each in (self._regime, *self._retired) for model in each.local.values()}
        for key, beside in list(self._beside.items()):
            if beside.local not in used:
                del self._beside[key]
                await asyncio.to_thread(beside.close)

    def _complain(self, error: EdgeError) -> None:
        if str(error) != self._problem:
            self._problem = str(error)
            _log.error("the policy before stays in force: %s", error)

    def _build(self, before: Regime | None) -> Regime:
        policy = read_policy(self._path)
        return Regime(policy, self._model_of, self._ledger, self._reach, self._speeds, self._model.names, before)

    def _model_of(self, tier: LocalTierSpec) -> LocalModel:
        """PolicyError if it cannot be opened."""
        if tier.model is None:
            return self._model
        key = replace(tier, name="")
        if key not in self._beside:
            try:
                self._beside[key] = self._open_beside(tier)
            except EdgeError as error:
                raise PolicyError(f"tier {tier.name}: {error}") from error
        return self._beside[key].local

    # --- answering ----------------------------------------------------------------------------------------------------

    def _conduct(self, decision: Decision) -> Generation:
        canceller = Canceller(self._network.loop)
        call, job = self._job(decision)
        leaves = decision.facts.params.n == 1 and decision.task.latency.total is None  # which is measured at its end
        canceller.start(decision.regime.conductor.answer(replace_field(job, leaves=leaves)))
        return RoutedGeneration(call, canceller)

    def _job(self, decision: Decision) -> tuple[Call, Job]:
        regime, facts, request = decision.regime, decision.facts, decision.facts.request
        here = current()
        lane = None if here is None else here.trace.lane("conductor")
        call = Call(facts.tokens, facts.params.n, decision.route, partial(regime.judge.stages.output, facts), lane)
        judgement = regime.judge.judgement(facts, decision.signals, decision.task)
        started = self._network.loop.time()
        return call, Job(call, request, decision.prepared, decision.task, decision.plan, judgement, started)

    async def _answer_deferred(self, name: str, request: TierRequest) -> Done:
        """By the tier that should do it; there is time, so that no other takes its place. EdgeError."""
        decision = await asyncio.to_thread(self.decide, request)
        plan, route, regime = decision.plan, decision.route, decision.regime
        if not plan.order:
            raise Router.refusal(request.params, decision.task, decision.candidates, plan)
        if plan.missing:
            raise TierUnavailable(told(plan.missing), next(iter(plan.missing)))
        if plan.order[0] in regime.remote:
            plan = replace_field(plan, order=tuple(tier for tier in plan.order if tier in regime.remote))
        route.request = name
        call, job = self._job(replace_field(decision, plan=plan))
        task = asyncio.create_task(regime.conductor.answer(job))
        try:
            chunks = [chunk.checked() async for chunk in EngineGeneration(call.outlet)]
        finally:
            task.cancel()
        usage = call.outlet.usage
        return Done(
            joined(chunks, request.params.n), usage.prompt_tokens, usage.completion_tokens, route.tier, route.headers()
        )


def _version_of(path: Path) -> tuple[int, ...]:
    """What changes when the file does."""
    try:
        stat = path.stat()
    except OSError as error:
        raise PolicyError(f"cannot read the policy {path}: {error.strerror or error}") from error
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


__all__ = ["Decision", "Dispatcher"]
