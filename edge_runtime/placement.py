"""On which device a model runs, and for which engine it is therefore prepared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from devices.discovery import Device
from devices.errors import DeviceUnavailable
from devices.names import parse_device
from devices.registry import Choice, Order, choose
from edge_runtime.errors import ModelNotFound
from edge_runtime.machine import fingerprint
from edge_runtime.measurements import Measurements, Workload
from edge_runtime.package import Package, Variant, Weights
from edge_runtime.references import PackageReference, parse_reference
from edge_runtime.store import Progress, Store

_WORKLOADS: dict[Workload, str] = {"one": "one stream", "many": "many streams", "long": "long prompts"}


Aside = Callable[[Package, Sequence[str]], Mapping[str, str]]
"""Which of the devices of these names shall not be taken for a package, and why."""


class Placement(NamedTuple):
    device: Device
    package: Package
    variant: Variant
    reason: str
    """Why this device, in words."""


def place(
    store: Store,
    ref: str,
    device: str,
    weights: Weights | None = None,
    progress: Progress | None = None,
    *,
    best: bool = False,
    workload: Workload = "one",
    aside: Aside = lambda package, names: {},
) -> Placement:
    """A device that ``device`` stands for and the model with a variant for it, fetched and exported if it is not here.

    An engine for which the model is here already is preferred to a better one, unless ``best`` asks for that. Of
    several that are here, the one that was fastest at ``workload`` when ``edge-glm bench`` measured them here is
    taken. ``aside`` keeps devices out, as those without enough memory. Raises UnknownDevice, DeviceUnavailable, and as
    :meth:`edge_runtime.store.Store.ensure`.
    """
    parse_device(device)  # a mistyped name is told before anything is fetched
    found = None if best else _ready(store, ref, device, weights, workload, aside)
    if found is None:
        choice = choose(device)
        found = choice.device, _reason(device, choice)
    try:
        return _placed(store, ref, weights, progress, *found)
    except ModelNotFound:  # packages by path or from the hub have the variants that they have
        other = _ready(store, ref, device, weights, workload, aside)
        if other is None or other[0] == found[0]:
            raise
        return _placed(store, ref, weights, progress, *other)


def _placed(
    store: Store, ref: str, weights: Weights | None, progress: Progress | None, device: Device, reason: str
) -> Placement:
    return Placement(device, *store.ensure(ref, device.engine, weights, progress), reason)


def _ready(
    store: Store, ref: str, device: str, weights: Weights | None, workload: Workload, aside: Aside
) -> tuple[Device, str] | None:
    """The best device for which the model is here, and why; None if there is none.

    DeviceUnavailable where none can be added.
    """
    present = store.present(ref)
    if present is None:
        return None
    engines = {each.engine for each in present.manifest.variants if weights in (None, each.weights)}
    order: Order = list
    compared: Mapping[str, float] = {}
    names = parse_device(device)
    if len(names) > 1 and len(engines) > 1 and store.home.measurements.exists():
        kept = Measurements(store.home.measurements, fingerprint())
        compared = kept.compared(names, present.name, weights, workload)
        order = partial(kept.order, model=present.name, weights=weights, workload=workload)
    kept_out = aside(present, names)
    try:
        choice = choose(device, engines, lambda names: [name for name in order(names) if name not in kept_out])
    except DeviceUnavailable:
        if isinstance(parse_reference(ref), PackageReference):
            raise
        return None
    if choice.device.name in compared and len(compared) > 1:
        return choice.device, f"the fastest here of {len(compared)} measured with {_WORKLOADS[workload]}"
    why = (f"{name}: {reason}" for name, reason in kept_out.items())
    return choice.device, _reason(device, choice._replace(passed_over=(*why, *choice.passed_over)))


def _reason(asked: str, choice: Choice) -> str:
    if len(parse_device(asked)) == 1:
        return "it was asked for"
    if not choice.passed_over:
        return f"the first choice for {asked.strip().lower()}"
    return "the best that can be used; not " + "; not ".join(choice.passed_over)
