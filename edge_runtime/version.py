"""The version of the installed distribution."""

from __future__ import annotations

from importlib import metadata


def version() -> str:
    """E.g. ``"0.1.0"``; ``"0+source"`` when run from a source folder without being installed."""
    try:
        return metadata.version("edge-glm")
    except metadata.PackageNotFoundError:
        return "0+source"
