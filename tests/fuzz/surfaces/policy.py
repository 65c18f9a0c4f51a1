"""Policy files, up to what a request would be routed by."""

from __future__ import annotations

import random
import tomllib
from copy import deepcopy
from typing import Any, NoReturn

from edge_runtime.errors import ModelNotFound, PolicyError
from edge_runtime.paths import Home
from edge_runtime.policy.check import problems
from edge_runtime.policy.rules import LocalTierSpec, read_policy
from edge_runtime.prompts import Messages, TierRequest
from edge_runtime.routing.dispatcher import Dispatcher
from edge_runtime.sampling import SamplingParams
from tests.fuzz.mutation import damage, disturb, vary
from tests.fuzz.surface import Case, Surface, command, sometimes
from tests.fuzz.toml import as_toml
from tests.tiers.house import QUESTION, FakeLocal

SEED = """
stages = ["plain-checks"]
[caps]
day = 1.5
month = 20.0
[privacy]
phone_region = "DE"
ledger_content = true
patterns = [{name = "Badge", regex = "[A-Z]{2}[0-9]{4}"}]
[deferred]
max_count = 10
[routing]
threshold = 0.5
forks = 3
[[tiers]]
name = "local"
kind = "local"
[[tiers]]
name = "shed"
kind = "edge-glm"
base_url = "http://localhost:9/v1"
model = "m"
context = 10_000
[[tiers]]
name = "cloud"
kind = "openai"
base_url = "https://localhost:9/v1"
model = "big"
context = 8000
max_output = 100
price = {input = 0.5, output = 1.5}
timeouts = {connect = 1.0, read = 2.0}
retry = {attempts = 2, base = 0.1}
breaker = {failures = 2}
[[classes]]
name = "letters"
privacy = "redact"
match = {keywords = ["letter", "dear"], tokens = {min = 1, max = 500}, field = {user = "a"}}
tiers = ["local", "cloud"]
latency = {ttft = 100.0}
cost_cap = {day = 0.1}
hold = {tokens = 4, ms = 100.0}
[[classes]]
name = "numbers"
match = {regex = "[0-9]+", header = {"x-a" = "b"}, metadata = {a = "b"}, tools = false}
mode = "deferred"
privacy = "any"
tiers = ["shed"]
[[classes]]
name = "all"
privacy = "any"
prefer = "remote"
hedge_ms = 50.0
"""
_MORE = {
    "tier": {"max_output": 64, "completions": True, "extra_sampling": True, "max_tokens_field": "max_tokens",
             "price": {"input": 1.0, "output": 2.0}, "timeouts": {"first_token": 3.0, "total": 9.0},
             "retry": {"attempts": 3, "longest": 1.0}, "breaker": {"cooldown": 1.0, "longest": 60.0}},
    "class": {"prefer": "remote", "mode": "interactive", "privacy": "redact", "escalate": False, "consistency": True,
              "hedge_ms": 0.0, "broken_stream": "continue", "latency": {"total": 500.0}, "cost_cap": {"month": 3.0},
              "hold": {"tokens": 2}, "match": {"languages": ["en"], "schema": True, "regex": "what|it",
              "keywords": ["it"], "tokens": {"min": 0, "max": 50}}, "tiers": ["cloud", "local"]},
}  # fmt: skip
"""What the seed leaves out."""
_WORDS: dict[str, tuple[object, ...]] = {
    "kind": (), "name": (), "stages": (), "max_tokens_field": ("max_tokens", "max_completion_tokens"),
    "base_url": ("http://localhost:9/v1", "https://[::1]:9/v1"), "phone_region": ("DE", "US", "GB"),
    "prefer": ("local", "remote", "order"), "mode": ("interactive", "deferred"),
    "privacy": ("local-only", "redact", "any"), "broken_stream": ("error", "continue"),
    "regex": ("[0-9]+", "what", "(?i)IT", "^$", "a|b*"), "languages": ("en", "de", "fr"),
}  # fmt: skip


class Policies(Surface):
    name = "policy"
    weight = 9

    def prepare(self) -> list[Case]:
        self._value: dict[str, Any] = tomllib.loads(SEED)
        return [Case("policy.toml", SEED.encode()), Case("policy.toml", as_toml(random.Random(0), self._value, True))]

    def make(self, rng: random.Random) -> Case:
        if rng.random() < 0.5:
            return Case("policy.toml", as_toml(rng, self._sound(rng), rng.random() < 0.5))
        if rng.random() < 0.25:
            return Case("policy.toml", damage(rng, SEED.encode()))
        data = as_toml(rng, disturb(rng, self._value, self.made(rng)), rng.random() < 0.5)
        return Case("policy.toml", damage(rng, data, most=1) if rng.random() < 0.1 else data)

    def _sound(self, rng: random.Random) -> dict[str, Any]:
        """Of the right types: other values, other keys."""
        value = deepcopy(self._value)
        for kind, holders in (("tier", value["tiers"][1:]), ("class", value["classes"])):
            for _ in range(rng.randint(0, 3)):
                key, more = rng.choice(list(_MORE[kind].items()))
                rng.choice(holders)[key] = deepcopy(more)
        if rng.random() < 0.3:
            del value[rng.choice(("stages", "caps", "privacy", "deferred", "routing"))]
        return dict(vary(rng, value, [_MORE], _WORDS)) if rng.random() < 0.8 else value

    def open(self) -> None:
        self._local = FakeLocal()

    def close(self) -> None:
        self._local.close()

    def run(self, case: Case) -> None:
        path = self.folder / case.name
        path.write_bytes(case.data)
        if sometimes(case, 32):
            command("route", "--check", str(path))
        policy = read_policy(path)
        if wrong := problems(policy):
            raise PolicyError("; ".join(wrong)[:500])
        dispatcher = Dispatcher(path, self._local, _not_here, Home(self.folder, self.folder), offline=False)
        try:
            request = TierRequest(Messages(QUESTION), SamplingParams(max_tokens=3))
            dispatcher.decide(request)
        finally:
            dispatcher.close()


def _not_here(tier: LocalTierSpec) -> NoReturn:
    raise ModelNotFound(f"{tier.model} is not on this machine")
