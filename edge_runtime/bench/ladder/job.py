"""The ladder: which rungs there are, and what is asked on each."""

from __future__ import annotations

from typing import Literal

import msgspec

from devices.names import parse_device
from edge_runtime.bench.result import Machine
from edge_runtime.errors import ConfigError
from edge_runtime.package import Weights

ENGINES = ("edge:cpu", "openvino:cpu")
"""Devices that are climbed when none is named: one of each engine."""
What = Literal["prepare", "measure", "agree"]
Baseline = Literal["onnxruntime", "openvino"]


class Rung(msgspec.Struct, frozen=True):
    """One way of running the model."""

    name: str
    device: str
    """Of the first rung the engine's CPU, by the same name."""
    weights: Weights = "fp32"
    ref: str | None = None
    """None: the model that is climbed."""
    unfused: bool = False
    """The plain graph."""
    whole: bool = False
    """Prompts are read in one step, not in chunks."""
    reuse: bool = False
    """KV cache of what prompts begin with is kept."""
    memory_budget: str | None = None
    draft: str | None = None
    draft_device: str | None = None


class Climb(msgspec.Struct, frozen=True, kw_only=True):
    """What is measured. ConfigError for numbers that cannot be."""

    ref: str
    device: str | None = None
    """None: :data:`ENGINES`."""
    int4: str | None = None
    """A package in place of the model's own int4, made of the same model by a recipe."""
    draft: str | None = None
    """A model that drafts on the last rung; None: there is no such rung."""
    draft_device: str | None = None
    threads: int | None = None
    memory_budget: str | None = None
    """Of the step that keeps prefixes; the one that drafts has a second model, and more."""
    prompt_tokens: int = 512
    new_tokens: int = 64
    requests: int = 4
    """Of each round; they share the beginning of their prompts."""
    repeats: int = 3
    """Measured rounds, after one to warm up. Rounds share nothing."""

    def __post_init__(self) -> None:
        least = {"prompt_tokens": 16, "new_tokens": 2, "requests": 2, "repeats": 1}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least {number} for --ladder")
        if self.draft_device is not None and self.draft is None:
            raise ConfigError("--draft-device says where a --draft runs: name one")

    @property
    def own_tokens(self) -> int:
        """Of a prompt, those at its end that no other shares."""
        return max(self.prompt_tokens // 8, 1)

    @property
    def shared_tokens(self) -> int:
        return self.prompt_tokens - self.own_tokens

    @property
    def devices(self) -> tuple[str, ...]:
        """ConfigError for one that has no baseline."""
        if self.device is None:
            return ENGINES
        names = parse_device(self.device)
        if len(names) != 1 or names[0] not in (*ENGINES, "onnxruntime:cpu"):
            raise ConfigError(
                f"--ladder climbs on {', '.join((*ENGINES, 'onnxruntime:cpu'))}, where the unfused graph runs too, "
                f"not on {self.device}"
            )
        return names

    def rungs(self, device: str) -> tuple[Rung, ...]:
        rungs = [
            Rung("fp32 unfused", device, unfused=True, whole=True),
            Rung("fp32 fused", device, whole=True),
            Rung("int8", device, "int8", whole=True),
            Rung("int4", device, "int4", self.int4, whole=True),
            Rung("chunks, prefix reuse", device, "int4", self.int4, reuse=True, memory_budget=self.memory_budget),
        ]
        if self.draft is not None:
            drafting = {"name": "draft", "draft": self.draft, "draft_device": self.draft_device, "memory_budget": None}
            rungs.append(msgspec.structs.replace(rungs[-1], **drafting))
        return tuple(rungs)


def baseline_of(device: str) -> Baseline:
    return "openvino" if device.startswith("openvino:") else "onnxruntime"


class Answered(msgspec.Struct, frozen=True):
    """One request."""

    tokens: list[int]
    first_s: float
    """To the first token."""
    last_s: float
    """To the last."""


class Measured(msgspec.Struct, frozen=True):
    """Of one rung, in its process."""

    rounds: list[list[Answered]]
    peak_rss_bytes: int | None


class Agreement(msgspec.Struct, frozen=True):
    """With the first rung, on the evaluation texts."""

    top1: float
    kl: float


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """A rung, and what it came to. None: this platform does not tell."""

    rung: Rung
    seconds: float
    """Of a request: mean of a round, median of the rounds."""
    ttft_ms: float
    tpot_ms: float
    peak_rss_bytes: int | None
    top1: float
    kl: float
    same: float
    """Share of the answers' tokens that come before the first that the first rung had otherwise."""


class Ladder(msgspec.Struct, frozen=True, kw_only=True):
    """All that was measured."""

    created: str
    climb: Climb
    steps: dict[str, list[Step]]
    """By device."""
    problems: dict[str, str]
    """Of devices that could not be climbed."""
    machine: Machine
