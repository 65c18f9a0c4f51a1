"""Which tiers may take a request, in which order, and why. A pure function of what is known."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edge_runtime.errors import EdgeError, InvalidRequest, PromptTooLong, TierUnavailable
from edge_runtime.policy.rules import TaskClass, TierSpec
from edge_runtime.prompts import Fit
from edge_runtime.sampling import SamplingParams


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
    """Tiers that the class prefers to the first of ``order`` and that cannot be asked just now, each with why."""


class Router:
    """Rules without state."""

    @staticmethod
    def choose(
        params: SamplingParams, task: TaskClass, candidates: Sequence[Candidate], estimate: Estimate | None = None
    ) -> Plan:
        """``candidates``: in the order in which the class prefers them.

        Hard gates first: privacy, then what cannot be asked or would not understand, then length. Then a request that
        is probably too hard goes to remote tiers first, and tiers that have been slower than the class's latency come
        after those that have not.
        """
        verdicts = {each.name: _gate(params, task, each) for each in candidates}
        reasons = {name: reason for name, (_, reason, _) in verdicts.items()}
        open_to = [each for each in candidates if verdicts[each.name][0]]
        escalates = task.escalate and params.n == 1 and any(each.spec.remote for each in open_to)
        if estimate is not None and escalates and task.prefer == "local" and estimate.good < estimate.remote_below:
            hard = f"probably too hard for the local model ({estimate.good:.2f} < {estimate.remote_below:.2f})"
            reasons |= {each.name: hard for each in open_to if each.spec.remote}
            open_to.sort(key=lambda each: not each.spec.remote)
        slow = {each.name: why for each in open_to if (why := _slow(task, each)) is not None}
        reasons |= slow
        open_to.sort(key=lambda each: each.name in slow)
        order = tuple(each.name for each in open_to)
        if order and order[0] == candidates[0].name:
            reasons[order[0]] = f"first choice of class {task.name}; {reasons[order[0]]}"
        judged = escalates and bool(open_to) and not open_to[0].spec.remote
        before = itertools.takewhile(lambda each: each.name not in order[:1], candidates)
        missing = {each.name: each.refusal for each in before if each.refusal is not None and verdicts[each.name][2]}
        return Plan(order, reasons, judged, missing)

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
    wanted, taken = task.latency.ttft, candidate.ttft_ms
    if wanted is not None and taken is not None and taken > wanted:
        return f"its first token took {taken:.0f} ms lately, the class wants {wanted:g}"
    wanted, taken = task.latency.total, candidate.total_ms
    if wanted is not None and taken is not None and taken > wanted:
        return f"its answers took {taken:.0f} ms lately, the class wants {wanted:g}"
    return None
