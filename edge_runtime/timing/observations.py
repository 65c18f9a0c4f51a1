"""What single requests took on this machine, as ``edge-glm bench`` and ``tune`` measured it: one file in the cache.

An observation speaks for the files of a model's variant, a device and the way it was opened, and only as long as the
processor and the versions of the engines are those it was made with.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from pathlib import Path

import msgspec

from devices.base import DecoderOptions
from edge_runtime.package import Variant
from edge_runtime.record_file import RecordFile

KEPT = 100
"""Runs in the file; the oldest go first."""
KEPT_EACH = 3
"""Runs of one subject: several, so that what drifts from hour to hour is part of the spread."""
_log = logging.getLogger("edge_glm.timing")


class FirstToken(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="first"):
    """From a prompt to its first token (TTFT)."""

    prompt: int
    """Tokens."""
    cached: int = 0
    """Of them, those whose keys and values were there already."""
    beside: int = 0
    """Other sequences that were decoding meanwhile."""
    held: int = 0
    """Tokens of their KV cache, all together."""
    seconds: float
    """The median of several times: what a request will meet, too, of others' work and of the processor's clock."""
    fastest: float | None = None
    slowest: float | None = None
    """The least and the most of them, if there were several."""


class EachToken(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="each"):
    """From one token to the next (TPOT), nothing but decoding going on."""

    batch: int = 1
    """Sequences that decode together."""
    held: int
    """Tokens of their KV cache, all together."""
    seconds: float
    fastest: float | None = None
    slowest: float | None = None
    """All as above."""


Observation = FirstToken | EachToken


def merged(rounds: Sequence[Sequence[Observation]]) -> list[Observation]:
    """One of each place in ``rounds``, which timed the same in the same order. ValueError if they did not."""
    found = []
    for same in zip(*rounds, strict=True):
        seconds = sorted(each.seconds for each in same)
        ends = {"fastest": seconds[0], "slowest": seconds[-1]} if len(same) > 1 else {}
        found.append(msgspec.structs.replace(same[0], seconds=statistics.median(seconds), **ends))
    return found


class Subject(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was timed: times of one say nothing of another."""

    variant: str
    """:attr:`edge_runtime.package.Variant.digest`."""
    device: str
    """``engine:hardware``, as really opened."""
    opened: str
    """What of the options decides how fast it is, in words."""
    machine: str
    """:func:`edge_runtime.machine.fingerprint`."""

    @classmethod
    def of(cls, variant: Variant, device: str, options: DecoderOptions, machine: str) -> Subject:
        said = {
            "chunk": options.prefill_chunk,
            "threads": options.threads,
            "KV cache": options.kv_type,
            "max prompt": options.max_prompt,
            "batch invariant": options.batch_invariant or None,
            **dict(sorted(options.properties.items())),
        }
        opened = ", ".join(f"{name} {value}" for name, value in said.items() if value is not None)
        return cls(variant.digest, device, opened, machine)


class TimedRun(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The observations of one opening of a model."""

    subject: Subject
    chunk: int
    """Tokens of a prompt in one step, at most."""
    created: str
    observations: list[Observation]


class Observations:
    """The file. Reading never fails: what cannot be used counts as nothing measured, and is said in the log."""

    def __init__(self, file: Path) -> None:
        self._runs = RecordFile(file, TimedRun, KEPT, _log, "bench again to replace it")

    def of(self, subject: Subject) -> list[TimedRun]:
        """Oldest first."""
        return [run for run in self._runs.read() if run.subject == subject]

    def keep(self, run: TimedRun) -> None:
        """Beside the latest of its subject. StorageError as :meth:`RecordFile.change`."""

        def changed(runs: list[TimedRun]) -> list[TimedRun]:
            same = [each for each in runs if each.subject == run.subject]
            gone = same[: max(len(same) - KEPT_EACH + 1, 0)]
            return [*(each for each in runs if each not in gone), run]

        self._runs.change(changed)
