"""Which tiers may take a request, in which order, and why. A pure function of what is known."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edge_runtime.errors import EdgeError, InvalidRequest, PromptTooLong, TierUnavailable
from edge_runtime.policy.rules import TaskClass, TierSpec
from edge_runtime.prompts import Fit
from edge_runtime.sampling import SamplingParams
from edge_runtime.timing.ttft import PredictedTTFT


@dataclass(frozen=True)
class Candidate:
    """A tier of the class, and how things stand with it."""

    spec: TierSpec
    fit: Fit
    refusal: str | None = None
    """Why it cannot be asked now."""
    unsupported: str | None = None
    """Why it cannot take this request, whenever."""
    ttft_ms: float | None = None
    """What it has taken to its first token lately."""
    total_ms: float | None = None
    """What it has taken for a whole answer lately."""
    predicted_ttft: PredictedTTFT | None = None
    """How long it will take to its first token, as the timing model says; None: nothing is known."""

    @property
    def name(self) -> str:
        return self.spec.name


@dataclass(frozen=True)
class Estimate:
    """What the signals say before anything has run."""

    good: float
    """P(local answer good enough)."""
    remote_below: float
    """Below it the local model is not even asked."""

    @property
    def too_hard(self) -> bool:
        return self.good < self.remote_below

    def __str__(self) -> str:
        return f"probably too hard for the local model ({self.good:.2f} < {self.remote_below:.2f})"


@dataclass(frozen=True)
class Plan:
    """The router's decision."""

    order: tuple[str, ...]
    """Names of the tiers that may take the request, best first; empty: none may."""
    reasons: Mapping[str, str]
    """For every tier: why it is where it is in ``order``, or why not."""
    judge: bool
    """Whether a local answer is to be judged by its first words, because a remote tier could do better."""
    missing: Mapping[str, str]
    """Tiers that would have been asked before the first of ``order`` and cannot be just now, each with why."""


class Router:
    """Rules without state."""

    @staticmethod
    def choose(
        params: SamplingParams, task: TaskClass, candidates: Sequence[Candidate], estimate: Estimate | None = None
    ) -> Plan:
        """``candidates``: in the order in which the class prefers them.

        Hard gates first: privacy, then what cannot be asked or would not understand, then length. Then a request that
        is probably too hard goes to remote tiers first, and tiers that are expected to be slower than the class's
        latency come after those that are not: by the time predicted for this request, else by what they took lately.
        """
        verdicts = {each.name: _gate(params, task, each) for each in candidates}
        reasons = {name: reason for name, (_, reason, _) in verdicts.items()}
        open_to = [each for each in candidates if verdicts[each.name][0]]
        may_escalate = task.escalate and params.n == 1
        escalates = may_escalate and any(each.spec.remote for each in open_to)
        hard = may_escalate and task.prefer == "local" and estimate is not None and estimate.too_hard
        if hard and escalates and estimate is not None:
            reasons |= {each.name: str(estimate) for each in open_to if each.spec.remote}
            open_to.sort(key=lambda each: not each.spec.remote)
        slow = {each.name: why for each in open_to if (why := _slow(task, each)) is not None}
        reasons |= slow
        open_to.sort(key=lambda each: each.name in slow)
        order = tuple(each.name for each in open_to)
        if order and order[0] == candidates[0].name:
            reasons[order[0]] = f"first choice of class {task.name}; {reasons[order[0]]}"
        locally = bool(open_to) and not open_to[0].spec.remote
        later = {each.name: each.refusal for each in candidates if each.refusal is not None and verdicts[each.name][2]}
        before = {each.name for each in itertools.takewhile(lambda each: each.name not in order[:1], candidates)}
        if locally and may_escalate and later and not escalates:
            reasons[order[0]] += "; it is not judged, since no remote tier can be asked"
            if hard:  # one would have been asked
                before |= set(later)
        missing = {name: refusal for name, refusal in later.items() if name in before}
        return Plan(order, reasons, locally and escalates, missing)

    @staticmethod
    def refusal(params: SamplingParams, task: TaskClass, candidates: Sequence[Candidate], plan: Plan) -> EdgeError:
        """The error where ``plan.order`` is empty: the counts where length is all that is wrong, else all reasons."""
        allowed = [each for each in candidates if not (each.spec.remote and task.privacy == "local-only")]
        able = [each for each in allowed if each.unsupported is None]
        if able and not any(each.fit.verdict(params)[0] for each in able):
            largest = max((each.fit for each in able), key=lambda fit: (fit.max_prompt, fit.max_context))
            return PromptTooLong(largest.verdict(params)[1], largest.short_of)
        told = "; ".join(f"{name}: {reason}" for name, reason in plan.reasons.items())
        if not able:
            return InvalidRequest(f"no tier can take this request: {told}")
        return TierUnavailable(f"no tier can take this request now: {told}", able[0].name)


def _gate(params: SamplingParams, task: TaskClass, candidate: Candidate) -> tuple[bool, str, bool]:
    """Whether it may take the request, why, and whether it could at another time."""
    if candidate.spec.remote and task.privacy == "local-only":
        return False, f"privacy of class {task.name} is local-only", False
    if candidate.unsupported is not None:
        return False, candidate.unsupported, False
    fits, reason = candidate.fit.verdict(params)
    if not fits or candidate.refusal is None:
        return fits, reason, fits
    return False, candidate.refusal, True


def _slow(task: TaskClass, candidate: Candidate) -> str | None:
    """Why it is too slow for the class; None: it is not, or nothing is known."""
    predicted_ttft = candidate.predicted_ttft
    wanted, taken = task.latency.ttft, candidate.ttft_ms
    if wanted is not None and predicted_ttft is not None:
        if predicted_ttft.ms > wanted:
            return f"its first token will take {predicted_ttft}, the class wants {wanted:g} ms"
    elif wanted is not None and taken is not None and taken > wanted:
        return f"its first token took {taken:.0f} ms lately, the class wants {wanted:g}"
    wanted, taken = task.latency.total, candidate.total_ms
    if wanted is not None and predicted_ttft is not None and predicted_ttft.ms > wanted:
        return f"its first token alone will take {predicted_ttft}, the class wants the whole answer in {wanted:g} ms"
    if wanted is not None and taken is not None and taken > wanted:
        return f"its answers took {taken:.0f} ms lately, the class wants {wanted:g}"
    return None
