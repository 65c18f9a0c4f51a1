"""The timing model of what is open, or would be opened, on this machine."""

from __future__ import annotations

from devices.base import DecoderOptions
from edge_runtime.errors import NotMeasured
from edge_runtime.machine import fingerprint
from edge_runtime.package import Variant
from edge_runtime.paths import Home
from edge_runtime.timing.model import TimingModel
from edge_runtime.timing.observations import Observations, Subject


def timing_model(home: Home, variant: Variant, device: str, options: DecoderOptions) -> TimingModel:
    """Of ``variant`` on ``device`` (``engine:hardware``) as ``options`` open it. NotMeasured."""
    if not home.timing.exists():  # the usual case, and then the machine need not be looked at
        raise NotMeasured(f"not measured here; edge-glm bench REF --device {device} does that")
    runs = Observations(home.timing).of(Subject.of(variant, device, options, fingerprint()))
    if not runs:
        raise NotMeasured(f"not measured here as it would be opened; edge-glm bench REF --device {device} does that")
    chunk = runs[-1].chunk
    return TimingModel([each for run in runs if run.chunk == chunk for each in run.observations], chunk)
