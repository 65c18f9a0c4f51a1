"""On which device a model runs, and for which engine it is therefore prepared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import msgspec

from devices.discovery import Device
from devices.errors import DeviceUnavailable
from devices.names import parse_device
from devices.registry import Choice, choose
from edge_runtime.errors import ModelNotFound
from edge_runtime.exporting import Progress
from edge_runtime.machine import fingerprint
from edge_runtime.measurements import Measurements, Workload
from edge_runtime.package import Package, Variant, Weights
from edge_runtime.references import PackageReference, parse_reference
from edge_runtime.store import Store

_WORKLOADS: dict[Workload, str] = {"one": "one stream", "many": "many streams", "long": "long prompts"}


class Wish(msgspec.Struct, frozen=True):
    """What is wanted of a placement."""

    ref: str
    device: str = "auto"
    weights: Weights | None = None
    workload: Workload = "one"
    fallback: bool = False
    """Where no device that ``device`` stands for can be used, those of ``auto`` will do."""

    @property
    def names(self) -> tuple[str, ...]:
        """Devices that will do, best first. UnknownDevice."""
        return parse_device(self.device, self.fallback)


Unfit = Callable[[Package, Sequence[str]], Mapping[str, str]]
"""Which of the devices of these names are nothing for a package, as for want of memory, and why."""


class Placement(NamedTuple):
    device: Device
    package: Package
    variant: Variant
    reason: str
    """Why this device, in words."""
    weights_reason: str | None = None
    """Why this variant, where several would do."""


def place(
    store: Store,
    wish: Wish,
    progress: Progress | None = None,
    *,
    best: bool = False,
    aside: Mapping[str, str] = MappingProxyType({}),
    unfit: Unfit = lambda package, names: {},
) -> Placement:
    """A device that will do and the model with a variant for it, fetched and exported if it is not here.

    An engine for which the model is here already is preferred to a better one, unless ``best`` asks for that. Of
    several that are here, the one that was fastest at the workload when ``edge-glm bench`` measured them here is
    taken. ``aside``: devices that are not to be taken, and why; ``unfit`` tells more of them, for a model that
    is here. Raises UnknownDevice, DeviceUnavailable, and as
    :meth:`edge_runtime.store.Store.ensure`.
    """
    names = wish.names  # a mistyped one is told before anything is fetched
    found = None if best else _ready(store, wish, aside, unfit)
    if found is None:
        choice = choose(wish.device, names, aside=aside)
        found = choice.device, _reason(wish, choice)
    try:
        return _placed(store, wish, progress, *found)
    except ModelNotFound:  # packages by path or from the hub have the variants that they have
        other = _ready(store, wish, aside, unfit)
        if other is None or other[0] == found[0]:
            raise
        return _placed(store, wish, progress, *other)


def _placed(store: Store, wish: Wish, progress: Progress | None, device: Device, reason: str) -> Placement:
    return Placement(device, *store.ensure(wish.ref, device.engine, wish.weights, progress), reason)


def _ready(store: Store, wish: Wish, aside: Mapping[str, str], unfit: Unfit) -> tuple[Device, str] | None:
    """The best device for which the model is here, and why; None if there is none.

    DeviceUnavailable where none can be added.
    """
    present = store.present(wish.ref)
    if present is None:
        return None
    engines = {each.engine for each in present.manifest.variants if wish.weights in (None, each.weights)}
    names = wish.names
    compared: Mapping[str, float] = {}
    if len(names) > 1 and len(engines) > 1 and store.home.measurements.exists():
        kept = Measurements(store.home.measurements, fingerprint())
        compared = kept.compared(names, present.name, wish.weights, wish.workload)
        names = tuple(kept.order(names, present.name, wish.weights, wish.workload))
    aside = {**unfit(present, names), **aside}
    try:
        choice = choose(wish.device, names, engines, aside)
    except DeviceUnavailable:
        if isinstance(parse_reference(wish.ref), PackageReference):
            raise
        return None
    if choice.device.name in compared and len(compared) > 1 and not aside:
        return choice.device, f"the fastest here of {len(compared)} measured with {_WORKLOADS[wish.workload]}"
    return choice.device, _reason(wish, choice)


def _reason(wish: Wish, choice: Choice) -> str:
    if parse_device(wish.device) == (choice.device.name,):
        return "it was asked for"
    if not choice.passed_over:
        return f"the first choice for {wish.device.strip().lower()}"
    return "the best that can be used; not " + "; not ".join(choice.passed_over)
