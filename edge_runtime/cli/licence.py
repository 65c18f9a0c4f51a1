"""The licence of a model, shown whenever one is pulled."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from edge_runtime.package import Package
from edge_runtime.paths import home
from edge_runtime.references import CatalogueReference, HubReference, PypiReference, parse_reference
from edge_runtime.store import Store
from edge_runtime.terminal import harmless


def licence_of(package: Package) -> str:
    """As its source says it; what it means is the user's to find out."""
    found = package.manifest.provenance.get("licence")
    return harmless(str(found)) if found else f"unknown: ask whoever made {harmless(package.name)}"


@contextmanager
def told_if_pulled(ref: str) -> Iterator[None]:
    """Says the licence on stderr if the block downloads ``ref``. UnknownReference."""
    downloaded = isinstance(parse_reference(ref), CatalogueReference | PypiReference | HubReference)
    store = Store(home())
    if not downloaded or store.present(ref) is not None:
        yield
        return
    yield
    package = store.present(ref)
    if package is not None:
        print(f"edge-glm: {harmless(package.name)}, licence: {licence_of(package)}", file=sys.stderr)
