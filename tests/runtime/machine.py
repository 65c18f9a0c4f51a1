"""Devices that fail, compile or do not open, as :class:`edge_runtime.failover.Failover` sees them."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from devices.base import DecoderOptions, Step
from devices.discovery import Device
from devices.errors import DeviceUnavailable, EngineError
from edge_runtime.engine import Engine, Successor
from edge_runtime.errors import EdgeError
from edge_runtime.failover import Failover
from edge_runtime.generation import Generation
from edge_runtime.loading import Loaded
from edge_runtime.package import Package, Variant
from edge_runtime.placement import Placement
from edge_runtime.prompts import TierRequest, TokenIds
from edge_runtime.sampling import SamplingParams
from edge_runtime.template import ChatTemplate
from edge_runtime.tiers.local import LocalTier
from edge_runtime.timing.model import TimingModel
from tests.fake_decoder import FakeDecoder
from tests.runtime.helpers import GREEDY, LetterTokenizer


class Failing:
    """Fails one forward after so many, as a device that is pulled out."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, batch: Sequence[Step]) -> None:
        self.left -= 1
        if self.left < 0:
            raise EngineError("the accelerator fell over")


class Letters(LetterTokenizer):
    eos_ids: Sequence[int] = ()


class Machine:
    """Devices ``fake:0``, ``fake:1``, … in this order, over fake decoders or what opening them raises."""

    def __init__(
        self, *decoders: FakeDecoder | EdgeError, compiling: threading.Event | None = None, **engine: Any
    ) -> None:
        """``compiling``: the first compiles the model until that is set. ``engine``: options of all engines."""
        self.engine = engine
        self.compiling = compiling
        self.decoders = {f"fake:{number}": decoder for number, decoder in enumerate(decoders)}
        self.opened: list[str] = []
        self.shares: dict[str, int] = {}
        self.timing: TimingModel | None = None

    def place(self, aside: Mapping[str, str]) -> Placement:
        for name in self.decoders:
            if name not in aside:
                passed_over = "; not ".join(f"{device}: {why}" for device, why in aside.items())
                compiles = self.compiling is not None and name == "fake:0"
                device = Device(name, "openvino", name, compiles=compiles)
                return Placement(device, NO_PACKAGE, NO_VARIANT, f"not {passed_over}")
        raise DeviceUnavailable("there is no other device")

    def load(self, placement: Placement, successor: Successor, sharing: int) -> Loaded:
        name = placement.device.name
        decoder = self.decoders[name]
        if placement.device.compiles and self.compiling is not None:
            assert self.compiling.wait(60)
        if isinstance(decoder, EdgeError):
            raise decoder
        self.shares[name] = sharing
        self.opened.append(name)
        tokens = Letters()
        engine = Engine(decoder, tokens, vocab_size=decoder.vocab_size, successor=successor, **self.engine)
        limits = decoder.limits
        tier = LocalTier(
            engine,
            tokens,  # type: ignore[arg-type]
            ChatTemplate(None, {}),
            max_prompt=limits.max_prompt,
            max_context=limits.max_context,
        )
        return Loaded(
            placement, name, engine, tier, limits.max_prompt, limits.max_context, DecoderOptions(), timing=self.timing
        )

    def start(self) -> Failover:
        return Failover(self.place, self.load, self.place({}))


NO_PACKAGE: Package = None  # type: ignore[assignment]
NO_VARIANT: Variant = None  # type: ignore[assignment]


def submit(failover: Failover, tokens: Sequence[int], params: SamplingParams = GREEDY) -> Generation:
    return failover.start(TierRequest(TokenIds(tokens), params))
