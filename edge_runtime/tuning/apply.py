"""What was found by ``edge-glm tune`` goes to a model that is opened."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from devices.base import DecoderOptions
from edge_runtime.machine import fingerprint
from edge_runtime.measurements import Workload
from edge_runtime.package import Variant
from edge_runtime.paths import Home
from edge_runtime.tuning.log import TuningLog
from edge_runtime.tuning.records import Options, Setup
from edge_runtime.tuning.space import opened


class Tuned(NamedTuple):
    options: DecoderOptions
    words: str | None
    """What was taken and what it gained; None: nothing was."""


def tuned(
    given: DecoderOptions,
    device: str,
    variant: Variant,
    workload: Workload,
    home: Home,
    tuning: bool | Options = True,
    *,
    budget: bool = False,
) -> Tuned:
    """``given`` with what is known to be faster on ``device`` where it leaves the choice to the device.

    ``tuning``: whether the log may say it, or what to take in its place. With a ``budget`` nothing is taken that may
    need more memory than the default. Never fails: see :class:`edge_runtime.tuning.log.TuningLog`.
    """
    if isinstance(tuning, Options):
        return Tuned(opened(Setup(device, tuning), given), None)
    if not tuning or not home.tuning.exists():
        return Tuned(given, None)
    run = TuningLog(home.tuning, fingerprint()).best(variant, device, workload)
    if run is None or run.best is None or run.best == run.default:
        return Tuned(given, None)
    options = run.best.options
    if given.threads is not None:
        options = msgspec.structs.replace(options, threads=None, pinning=None)
    if given.kv_type is not None or given.batch_invariant:  # which has a choice of types of its own
        options = msgspec.structs.replace(options, kv_type=None)
    if budget:
        options = options.frugal()
    if options == Options():
        return Tuned(given, None)
    best = Setup(device, options)
    gained = f": {run.gain:.2f} times the default" if best == run.best else ""
    if run.default.device != device:
        gained += f" ({run.default.device})" if gained else ""
    return Tuned(opened(best, given), f"tuned {run.day}: {options}{gained}")
