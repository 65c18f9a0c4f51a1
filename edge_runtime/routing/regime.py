"""One version of the policy, and all that is built from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from edge_runtime.egress.door import Door
from edge_runtime.egress.ledger import Ledger
from edge_runtime.errors import PolicyError
from edge_runtime.policy.check import key_of, problems
from edge_runtime.policy.rules import NO_MATTER, LocalTierSpec, Policy, TaskClass
from edge_runtime.prompts import TierRequest
from edge_runtime.routing.calibration import read_calibration, shipped
from edge_runtime.routing.conductor import Conductor
from edge_runtime.routing.judge import Judge
from edge_runtime.routing.matching import Matcher
from edge_runtime.routing.router import Candidate
from edge_runtime.routing.sources import Speeds
from edge_runtime.stages.registry import Stages
from edge_runtime.tiers.breaker import Breaker
from edge_runtime.tiers.model import LocalModel
from edge_runtime.tiers.network import Reach
from edge_runtime.tiers.remote import RemoteTier

OpenModel = Callable[[LocalTierSpec], LocalModel]
"""The model of a local tier, opened if it is not open yet."""


class Regime:
    """PolicyError, with everything that is wrong, where ``policy`` cannot be used."""

    def __init__(
        self,
        policy: Policy,
        open_model: OpenModel,
        ledger: Ledger,
        reach: Reach,
        speeds: Speeds,
        model_names: Sequence[str],
        before: Regime | None = None,
    ) -> None:
        """``model_names``: of the model that was opened; ``before``: whose circuit breakers go on, for tiers that are
        the same."""
        wrong = problems(policy)
        if wrong:
            raise PolicyError("; ".join(wrong))
        self.policy = policy
        self.matcher = Matcher(policy.classes)
        self.door = Door(policy, ledger, reach.refusal)
        self.remote: Mapping[str, RemoteTier] = {
            name: RemoteTier(spec, key_of(spec), self.door, reach.refusal, _breaker(spec.name, spec, before))
            for name, spec in policy.remote_tiers.items()
        }
        self.local: Mapping[str, LocalModel] = {
            tier.name: open_model(tier) for tier in policy.tiers if isinstance(tier, LocalTierSpec)
        }
        self.conductor = Conductor(self.local, self.remote, speeds)
        self._speeds = speeds
        rules = policy.routing
        calibration = shipped(*model_names) if rules.calibration is None else read_calibration(Path(rules.calibration))
        self.judge = Judge(Stages(policy.stages), calibration, rules)

    def prepared(
        self, request: TierRequest, already: Mapping[LocalModel, TierRequest], task: TaskClass
    ) -> dict[str, TierRequest]:
        """For every local tier of the class the request as token ids. TemplateError, InvalidRequest."""
        known = dict(already)
        local = {spec.name: self.local[spec.name] for spec in self.policy.tiers_of(task) if spec.name in self.local}
        for model in local.values():
            if model not in known:
                known[model] = model.prepare(request)
        return {name: known[model] for name, model in local.items()}

    def candidates(
        self, request: TierRequest, prepared: Mapping[str, TierRequest], tokens: int, task: TaskClass
    ) -> list[Candidate]:
        """The tiers of the class, in its order of preference, and how things stand with them."""
        found = []
        for spec in self.policy.tiers_of(task):
            took = self._speeds.ttft_ms(spec.name), self._speeds.total_ms(spec.name)
            if spec.name in self.remote:
                tier = self.remote[spec.name]
                found.append(Candidate(spec, tier.fit(tokens), tier.refusal, tier.unsupported(request), *took))
            else:
                model, asked = self.local[spec.name], prepared[spec.name]
                predicted_ttft = model.predicted_ttft(asked) if task.latency != NO_MATTER else None
                found.append(Candidate(spec, model.fit(asked), None, model.unsupported(request), *took, predicted_ttft))
        return found

    def states(self) -> dict[str, dict[str, str]]:
        """For /health: every tier's state, and why it is not asked."""
        told = {name: {"kind": "local", "state": "ready"} for name in self.local}
        for name, tier in self.remote.items():
            refusal = tier.refusal
            state: str = tier.breaker.state
            if refusal is not None and state == "closed":
                state = "off"
            told[name] = {"kind": "remote", "state": state} | ({} if refusal is None else {"reason": refusal})
        return {tier.name: told[tier.name] for tier in self.policy.tiers}


def _breaker(name: str, spec: object, before: Regime | None) -> Breaker | None:
    known = None if before is None else before.remote.get(name)
    return known.breaker if known is not None and known.spec == spec else None
