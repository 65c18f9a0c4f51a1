"""What a model is, for those who list models."""

from __future__ import annotations

from dataclasses import dataclass

from edge_runtime.package import Package, Variant


@dataclass(frozen=True)
class ModelFacts:
    """Of one variant of a package."""

    family: str
    parameters: int
    weights: str
    nbytes: int
    """On the disk."""
    context: int
    """Tokens that the model was made for."""
    digest: str
    """SHA-256, hexadecimal, of what it is made of."""
    licence: str | None = None
    template: str | None = None
    """Jinja source; None: it takes no messages."""


def facts_of(package: Package, variant: Variant) -> ModelFacts:
    """StorageError where the package is gone."""
    manifest = package.manifest
    licence = manifest.provenance.get("licence")
    return ModelFacts(
        family=manifest.architecture.family,
        parameters=manifest.architecture.parameters,
        weights=variant.weights,
        nbytes=variant.bytes,
        context=manifest.architecture.max_context,
        digest=package.digest,
        licence=None if licence is None else str(licence),
        template=package.chat_template,
    )
