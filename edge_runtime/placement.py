"""On which device a model runs, and for which engine it is therefore prepared."""

from __future__ import annotations

from collections.abc import Sequence

from devices.discovery import Device
from devices.errors import DeviceUnavailable
from devices.names import parse_device
from devices.registry import choose_device
from edge_runtime.errors import ModelNotFound
from edge_runtime.machine import fingerprint
from edge_runtime.measurements import Measurements, Workload
from edge_runtime.package import Package, Variant, Weights
from edge_runtime.references import PackageReference, parse_reference
from edge_runtime.store import Progress, Store


def place(
    store: Store,
    ref: str,
    device: str,
    weights: Weights | None = None,
    progress: Progress | None = None,
    *,
    best: bool = False,
    workload: Workload = "one",
) -> tuple[Device, Package, Variant]:
    """A device that ``device`` stands for and the model with a variant for it, fetched and exported if it is not here.

    An engine for which the model is here already is preferred to a better one, unless ``best`` asks for that. Of
    several that are here, the one that was fastest at ``workload`` when ``edge-glm bench`` measured them here is
    taken. Raises UnknownDevice, DeviceUnavailable, and as :meth:`edge_runtime.store.Store.ensure`.
    """
    parse_device(device)  # a mistyped name is told before anything is fetched
    chosen = None if best else _ready(store, ref, device, weights, workload)
    if chosen is None:
        chosen = choose_device(device)
    try:
        return chosen, *store.ensure(ref, chosen.engine, weights, progress)
    except ModelNotFound:  # packages by path or from the hub have the variants that they have
        other = _ready(store, ref, device, weights, workload)
        if other is None or other == chosen:
            raise
        return other, *store.ensure(ref, other.engine, weights, progress)


def _ready(store: Store, ref: str, device: str, weights: Weights | None, workload: Workload) -> Device | None:
    """The best device for which the model is here, None if there is none; DeviceUnavailable where none can be added."""
    present = store.present(ref)
    if present is None:
        return None
    engines = {each.engine for each in present.manifest.variants if weights in (None, each.weights)}

    def measured(names: Sequence[str]) -> Sequence[str]:
        if len(names) == 1 or len(engines) == 1 or not store.home.measurements.exists():
            return names
        kept = Measurements(store.home.measurements, fingerprint())
        return kept.order(names, present.name, weights, workload)

    try:
        return choose_device(device, engines, measured)
    except DeviceUnavailable:
        if isinstance(parse_reference(ref), PackageReference):
            raise
        return None
