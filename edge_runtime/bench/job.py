"""What to measure, checked before anything is opened."""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from devices.kv_types import KVWish
from edge_runtime.errors import ConfigError
from edge_runtime.package import Weights
from edge_runtime.tuning.records import Options

TAIL_TOKENS = 32
"""Tokens of a prompt after the shared prefix."""


class Job(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A measurement in a process of its own. ConfigError for numbers that cannot be measured."""

    ref: str
    device: str = "auto"
    weights: Weights | None = None
    memory_budget: str | None = None
    threads: int | None = None
    kv_type: KVWish | None = None
    batch_invariant: bool = False
    prompt_tokens: int = 512
    new_tokens: int = 64
    concurrency: int = 1
    repeats: int = 5
    """Measured rounds, after one to warm up."""
    seed: int = 0
    shared_prefix: int | None = None
    """Also measure the first token of prompts that share so many tokens, unknown and known."""
    copy: bool = False
    """Also measure answers that repeat their prompt, with and without prompt lookup."""
    nll: bool = True
    """Also score the bundled text, so that a speed comes with what it cost."""
    timing: bool = False
    """Also time single requests of several lengths, for the timing model (:mod:`edge_runtime.timing`)."""
    tuning: Options | None = None
    """How to open the model; None: as ``edge-glm tune`` found best, where it has."""

    def __post_init__(self) -> None:
        _check_shape(self.prompt_tokens, self.new_tokens)
        _at_least("concurrency", self.concurrency, 1)
        _at_least("repeats", self.repeats, 1)
        _at_least("seed", self.seed, 0)
        if self.shared_prefix is not None:
            _at_least("shared-prefix", self.shared_prefix, 1)

    def check_room(self, context: int, kv_tokens: int) -> None:
        """ConfigError if the model cannot hold it: ``context`` tokens in one sequence, ``kv_tokens`` in all."""
        one = self.prompt_tokens + self.new_tokens
        if one > context:
            raise ConfigError(
                f"--prompt-tokens {self.prompt_tokens} and --new-tokens {self.new_tokens} make {one} tokens; "
                f"the context of this model and device has {context}"
            )
        if self.concurrency * one > kv_tokens:
            raise ConfigError(
                f"{self.concurrency} streams of {one} tokens need a KV cache of {self.concurrency * one} tokens, "
                f"this one has {kv_tokens}: they would not run at once; lower --concurrency or --prompt-tokens"
            )
        if self.shared_prefix is not None and self.shared_prefix + TAIL_TOKENS + 1 > context:
            raise ConfigError(
                f"--shared-prefix {self.shared_prefix} and the {TAIL_TOKENS} tokens after it leave no room for an "
                f"answer; the context of this model and device has {context} tokens"
            )


class Goodput(msgspec.Struct, frozen=True):
    """The limits within which a request counts as served well, in milliseconds. None: no limit."""

    ttft: float | None = None
    tpot: float | None = None

    @classmethod
    def parse(cls, words: list[str]) -> Goodput:
        """``["ttft:500", "tpot:50"]``. ConfigError for anything else."""
        limits: dict[str, float] = {}
        for word in words:
            name, _, number = word.partition(":")
            try:
                limit = float(number)
            except ValueError:
                limit = math.nan
            if name not in ("ttft", "tpot") or name in limits or not 0 < limit < math.inf:
                raise ConfigError(f"--goodput takes limits in milliseconds such as ttft:500 tpot:50, not {word!r}")
            limits[name] = limit
        return cls(**limits)

    def holds(self, ttft_ms: float, tpot_ms: float | None) -> bool:
        slow = self.tpot is not None and tpot_ms is not None and tpot_ms > self.tpot
        return not slow and (self.ttft is None or ttft_ms <= self.ttft)


class LoadJob(msgspec.Struct, frozen=True, kw_only=True):
    """Requests to a server. ConfigError for numbers that cannot be measured."""

    url: str
    model: str | None = None
    """None: the only one that the server has."""
    endpoint: Literal["completions", "chat"] = "completions"
    api_key: str | None = None
    prompt_tokens: int = 512
    new_tokens: int = 64
    concurrency: int | None = None
    """Requests kept running, each followed by the next (closed loop); None: 1, unless there is a rate."""
    rate: float | None = None
    """Poisson arrivals, so many a second on average, however many are running (open loop)."""
    requests: int | None = None
    """None: 20, and at least 5 for each of ``concurrency``."""
    seed: int = 0
    goodput: Goodput | None = None

    def __post_init__(self) -> None:
        _check_shape(self.prompt_tokens, self.new_tokens)
        _at_least("seed", self.seed, 0)
        if self.concurrency is not None:
            _at_least("concurrency", self.concurrency, 1)
            if self.rate is not None:
                raise ConfigError("--rate sends requests however many are running: leave --concurrency out")
        if self.requests is not None:
            _at_least(
                "requests",
                self.requests,
                self.concurrency or 1,
                " (one for each of --concurrency)" if self.concurrency else "",
            )
        if self.rate is not None and not 0 < self.rate < math.inf:
            raise ConfigError(f"--rate must be a number of requests per second above 0, not {self.rate:g}")

    @property
    def total(self) -> int:
        """Requests to send."""
        return max(20, 5 * (self.concurrency or 1)) if self.requests is None else self.requests


def _check_shape(prompt_tokens: int, new_tokens: int) -> None:
    _at_least("prompt-tokens", prompt_tokens, 1)
    _at_least("new-tokens", new_tokens, 2, " (the time per token is the time between tokens)")


def _at_least(flag: str, value: int, least: int, why: str = "") -> None:
    if value < least:
        raise ConfigError(f"--{flag} must be at least {least}{why}, not {value}")
