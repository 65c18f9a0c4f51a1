"""Versions of what is installed: this distribution, and others."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress


def version() -> str:
    """E.g. ``"0.1.0"``; ``"0+source"`` when run from a source folder without being installed."""
    from importlib import metadata  # late: it brings the email package, 20 ms and 1.4 MB

    try:
        return metadata.version("edge-glm")
    except metadata.PackageNotFoundError:
        return "0+source"


def installed(names: Iterable[str]) -> dict[str, str]:
    """Those distributions of ``names`` that are there → their versions."""
    from importlib import metadata

    versions = {}
    for name in names:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions
