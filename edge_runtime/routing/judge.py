"""Whether a local answer that has begun is probably good enough."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

from edge_runtime.errors import EdgeError
from edge_runtime.facts import Facts
from edge_runtime.policy.rules import Routing, TaskClass
from edge_runtime.prompts import TierRequest
from edge_runtime.routing.answer_signals import confidence_signals, surprise_signals, text_signals
from edge_runtime.routing.calibration import Calibration
from edge_runtime.routing.consistency import consistency
from edge_runtime.routing.router import Estimate
from edge_runtime.routing.sources import LocalSource
from edge_runtime.stages.registry import Stages
from edge_runtime.tiers.model import LocalModel
from edge_runtime.watch import Watch


@dataclass(frozen=True)
class Verdict:
    """``good``: P(good enough), where it was estimated."""

    enough: bool
    reason: str
    good: float | None
    signals: Mapping[str, float]


class Judge:
    """By the stages, and by a calibration if there is one for the model: without, only what is plainly wrong counts."""

    def __init__(self, stages: Stages, calibration: Calibration | None, rules: Routing) -> None:
        self.stages = stages
        self._calibration = calibration
        self._rules = rules

    def estimate(self, signals: Mapping[str, float]) -> Estimate | None:
        """Before anything has run."""
        known = self._calibration
        return None if known is None else Estimate(known.before(signals), known.remote_below)

    def judgement(self, facts: Facts, signals: Mapping[str, float], task: TaskClass) -> Judgement:
        return Judgement(self, facts, signals, task)

    def weigh(self, source: LocalSource, watch: Watch, judgement: Judgement, agreed: float | None) -> Verdict:
        """``agreed``: of the consistency checker; None: it was not asked, or not done in time."""
        facts, known = judgement.facts, self._calibration
        text, tokens = source.text, [token for chunk in source.held for token in chunk.token_ids]
        signals = {
            **judgement.signals,
            **surprise_signals(watch),
            **confidence_signals(watch.answer),
            **text_signals(text, facts.question),
            **({} if agreed is None else {"agreement": agreed}),
        }
        problem = self.stages.problem(text, tokens, source.ended, facts)
        good = None
        if known is not None:
            good = (known.during if agreed is None else known.consistent)(signals)
        if problem is not None:
            return Verdict(False, f"the local answer is not good enough: {problem}", good, signals)
        if good is None or known is None:
            return Verdict(True, "nothing is wrong with the first words of the local answer", None, signals)
        threshold = known.threshold if self._rules.threshold is None else self._rules.threshold
        if good < threshold:
            return Verdict(
                False, f"the local answer is probably not good enough ({good:.2f} < {threshold:.2f})", good, signals
            )
        return Verdict(True, f"the local answer is probably good enough ({good:.2f} >= {threshold:.2f})", good, signals)

    async def agreement(self, model: LocalModel, prepared: TierRequest) -> float | None:
        """None where it cannot be found."""
        with suppress(EdgeError):
            return await consistency(model, prepared, self._rules.forks, self._rules.fork_tokens)
        return None


class Judgement:
    """Of one request."""

    def __init__(self, judge: Judge, facts: Facts, signals: Mapping[str, float], task: TaskClass) -> None:
        self.facts = facts
        self.signals = signals
        self._judge = judge
        self._task = task
        self._watch = Watch(tokens=task.hold.tokens)
        self._forks: asyncio.Task[float | None] | None = None

    def watched(self, prepared: TierRequest) -> TierRequest:
        """The request, so that the model is watched while it answers."""
        self._watch = Watch(tokens=self._task.hold.tokens)
        return replace(prepared, watch=self._watch)

    def begin(self, model: LocalModel, prepared: TierRequest) -> None:
        """The answer has been asked for."""
        if self._task.consistency:
            self._forks = asyncio.create_task(self._judge.agreement(model, prepared))

    async def verdict(self, source: LocalSource, until: float) -> Verdict:
        """``until``: of the loop's clock; what is not known by then does not count."""
        agreed = None
        if self._forks is not None:
            left = max(0.0, until - asyncio.get_running_loop().time())
            done, _ = await asyncio.wait([self._forks], timeout=left)
            agreed = self._forks.result() if done else None
            self.end()
        return self._judge.weigh(source, self._watch, self, agreed)

    def end(self) -> None:
        """Nothing of it is wanted any more. Idempotent."""
        if self._forks is not None:
            self._forks.cancel()
