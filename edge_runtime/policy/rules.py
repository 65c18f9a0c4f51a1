"""The owner's policy: which tiers there are, and which requests may go where, at what price and with what privacy.

A TOML file, read strictly: an unknown key, tier or value is an error that names its place. What contradicts itself is
one too (:mod:`edge_runtime.policy.check`).
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from edge_runtime.errors import PolicyError
from edge_runtime.package import WeightsWish

Privacy = Literal["local-only", "redact", "any"]
"""What may leave the device: nothing; text without what :mod:`edge_runtime.egress.redaction` finds; everything."""


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class Price(_Strict, frozen=True):
    """Per million tokens, in whatever currency; caps count in the same."""

    input: float = 0.0
    output: float = 0.0


class Timeouts(_Strict, frozen=True):
    """Seconds."""

    connect: float = 3.0
    first_token: float = 30.0
    """From sending to the first piece of the answer."""
    read: float = 20.0
    """Between two pieces."""
    total: float = 300.0


class Retry(_Strict, frozen=True):
    """Of what failed before the first piece of the answer. Waits are drawn from 0 to ``base·2ⁿ`` seconds, at most
    ``longest`` ("full jitter", AWS Architecture Blog, 2015); a server's Retry-After counts instead."""

    attempts: int = 3
    base: float = 0.25
    longest: float = 8.0


class BreakerRule(_Strict, frozen=True):
    """After so many ``failures`` one after the other a tier is left alone for ``cooldown`` seconds, then asked once; at
    each failure of that probe twice as long, at most ``longest``."""

    failures: int = 5
    cooldown: float = 10.0
    longest: float = 300.0


class LocalTierSpec(_Strict, frozen=True, tag_field="kind", tag="local"):
    """A model in this process. Without ``model`` the one that was opened; with it another one beside it."""

    name: str
    model: str | None = None
    device: str = "auto"
    weights: WeightsWish | None = None
    memory_budget: str | None = None

    @property
    def remote(self) -> bool:
        return False


class RemoteTierSpec(_Strict, frozen=True, tag_field="kind", tag="openai"):
    """Any OpenAI-compatible endpoint."""

    name: str
    base_url: str
    """With the ``/v1``."""
    model: str
    context: int
    """Tokens that prompt and answer may have together there."""
    max_output: int = 4096
    """Tokens of an answer whose request names no limit."""
    api_key_env: str | None = None
    api_key_file: str | None = None
    price: Price = Price()
    timeouts: Timeouts = Timeouts()
    retry: Retry = Retry()
    breaker: BreakerRule = BreakerRule()
    completions: bool = False
    """It has /completions too, for plain text."""
    extra_sampling: bool = False
    """It knows top_k, min_p and repetition_penalty, as vLLM does."""
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    ca_file: str | None = None
    """Certificates to trust, PEM, in place of the system's."""

    @property
    def remote(self) -> bool:
        return True


class EdgeTierSpec(
    RemoteTierSpec, frozen=True, tag_field="kind", tag="edge-glm", kw_only=True, forbid_unknown_fields=True
):
    """Another ``edge-glm serve``: knows all that this one does."""

    completions: bool = True
    extra_sampling: bool = True


TierSpec = LocalTierSpec | RemoteTierSpec | EdgeTierSpec


class Range(_Strict, frozen=True):
    min: int = 0
    max: int | None = None

    def holds(self, value: int) -> bool:
        return self.min <= value and (self.max is None or value <= self.max)


class Match(_Strict, frozen=True):
    """Conditions on a request; all that are given must hold."""

    field: dict[str, str] = {}
    """Of the request's JSON: ``user``, ``service_tier``, ``prompt_cache_key``, ``safety_identifier``, ``model``."""
    metadata: dict[str, str] = {}
    header: dict[str, str] = {}
    keywords: tuple[str, ...] | None = None
    """Any of them in the last user message, as a word, in any case."""
    regex: str | None = None
    """Found in the last user message. RE2 syntax: its time grows with the text only, whatever the pattern."""
    tokens: Range | None = None
    """Length of the whole prompt."""
    languages: tuple[str, ...] | None = None
    """Of the last user message, ISO 639-1."""
    tools: bool | None = None
    schema: bool | None = None
    """Whether it asks for JSON (``response_format``)."""

    @property
    def empty(self) -> bool:
        return self == Match()


class Latency(_Strict, frozen=True):
    """Milliseconds that a request of the class should take; None: no matter."""

    ttft: float | None = None
    total: float | None = None


NO_MATTER = Latency()


class CostCap(_Strict, frozen=True):
    """In the currency of the prices. None: no limit."""

    day: float | None = None
    month: float | None = None


class Hold(_Strict, frozen=True):
    """How long the first words of a local answer may be held back while it is judged."""

    tokens: int = 16
    ms: float = 500.0


class TaskClass(_Strict, frozen=True):
    """A kind of request, and what holds for it."""

    name: str
    match: Match = Match()
    """Nothing: every request."""
    tiers: tuple[str, ...] | None = None
    """In order of preference. None: all of the policy."""
    prefer: Literal["local", "remote", "order"] = "local"
    mode: Literal["interactive", "deferred"] = "interactive"
    privacy: Privacy = "local-only"
    latency: Latency = Latency()
    cost_cap: CostCap = CostCap()
    hold: Hold = Hold()
    escalate: bool = True
    """Whether a local answer that is probably not good enough is made by a remote tier instead."""
    consistency: bool = False
    """Whether the judgement also compares several short continuations (:mod:`edge_runtime.routing.consistency`)."""
    hedge_ms: float | None = None
    """So long after the first tier the next one is asked too; the first to answer wins. 0: at once."""
    broken_stream: Literal["error", "continue"] = "error"
    """When a remote answer breaks off: an error, or a local model goes on from its text."""


UNMATCHED = TaskClass(name="unmatched")
"""What no class of the policy takes stays on the device."""


class Deferred(_Strict, frozen=True):
    """Bounds of the queue of deferred requests."""

    max_count: int = 1000
    max_bytes: int = 64 * 2**20
    max_age_hours: float = 168.0


class Pattern(_Strict, frozen=True):
    """Something more to keep on the device: ``name`` becomes part of the placeholder."""

    name: str
    regex: str


class PrivacyRules(_Strict, frozen=True):
    patterns: tuple[Pattern, ...] = ()
    phone_region: str | None = None
    """ISO 3166-1 country whose phone numbers are found without +; None: international ones only."""
    ledger_content: bool = False
    """Whether the ledger keeps what was sent, besides its hash."""


class Routing(_Strict, frozen=True):
    calibration: str | None = None
    """A file of ``edge-glm route calibrate``. None: the one that comes with the model, if there is one."""
    threshold: float | None = None
    """P(local answer good enough) below which it is escalated. None: the calibration's."""
    forks: int = 3
    """Continuations that the consistency checker compares."""
    fork_tokens: int = 16


class Policy(_Strict, frozen=True):
    """The whole file."""

    tiers: tuple[TierSpec, ...]
    classes: tuple[TaskClass, ...] = ()
    """The first that matches counts."""
    caps: CostCap = CostCap()
    privacy: PrivacyRules = PrivacyRules()
    deferred: Deferred = Deferred()
    routing: Routing = Routing()
    stages: tuple[str, ...] | None = None
    """Names of the stages that are on, in this order. None: those that are on by themselves."""
    ends_with: str | None = None
    """The file's last line, as a comment. One that was cut off, by a kill or a full disk while it was written, ends
    otherwise, and is refused, even where what is left of it would be a policy, too."""

    def tier(self, name: str) -> TierSpec:
        return next(tier for tier in self.tiers if tier.name == name)

    def tiers_of(self, task: TaskClass) -> Sequence[TierSpec]:
        """In the order in which they are preferred."""
        tiers = self.tiers if task.tiers is None else [self.tier(name) for name in task.tiers]
        if task.prefer == "order":
            return list(tiers)
        return sorted(tiers, key=lambda tier: tier.remote != (task.prefer == "remote"))

    @property
    def remote_tiers(self) -> Mapping[str, RemoteTierSpec]:
        return {tier.name: tier for tier in self.tiers if isinstance(tier, RemoteTierSpec)}


LOCAL_POLICY = Policy(tiers=(LocalTierSpec(name="local"),))
"""Where there is no file."""


def read_policy(path: Path) -> Policy:
    """PolicyError: not readable, cut off, not TOML, or a key or value that there is not; says where."""
    try:
        text = path.read_text(encoding="utf-8")
        data = tomllib.loads(text)
    except (OSError, ValueError, RecursionError) as error:  # ValueError: also for a number of thousands of digits
        raise PolicyError(f"cannot read the policy {path}: {error}") from error
    try:
        policy = msgspec.convert(data, Policy)
    except msgspec.ValidationError as error:
        raise PolicyError(f"{path}: {error}") from error
    if not text.endswith("\n"):
        raise PolicyError(f"{path} does not end with a line break, so it may be cut off: end its last line")
    last = text.splitlines()[-1].strip()
    if policy.ends_with is not None and last != policy.ends_with:
        raise PolicyError(f"{path} is cut off: its last line is {last!r} and not {policy.ends_with!r} (ends_with)")
    return policy
