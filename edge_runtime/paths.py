"""Where things live: the platform's user folders, or all under EDGE_GLM_HOME."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.errors import ConfigError

APP = "edge-glm"


@dataclass(frozen=True)
class Home:
    """The folders of one user. Nothing is created until something is written."""

    data: Path
    cache: Path

    @property
    def models(self) -> Path:
        return self.data / "models"

    @property
    def ledger(self) -> Path:
        """What has left this device (:mod:`edge_runtime.egress.ledger`)."""
        return self.data / "ledger.sqlite"

    @property
    def keys(self) -> Path:
        """Digests of the server's API keys (:mod:`edge_runtime.keys`)."""
        return self.data / "keys.json"

    @property
    def deferred(self) -> Path:
        """Requests that are answered later (:mod:`edge_runtime.deferred`)."""
        return self.data / "deferred.sqlite"

    @property
    def verified(self) -> Path:
        """Notes on files whose hashes have been found right."""
        return self.cache / "verified"

    @property
    def compiled(self) -> Path:
        """Compiled models that engines keep."""
        return self.cache / "compiled"

    @property
    def measurements(self) -> Path:
        """What ``edge-glm bench`` measured (:mod:`edge_runtime.measurements`)."""
        return self.cache / "measurements.json"

    @property
    def timing(self) -> Path:
        """What single requests took here (:mod:`edge_runtime.timing`)."""
        return self.cache / "timing.json"

    @property
    def tuning(self) -> Path:
        """What ``edge-glm tune`` tried and found (:mod:`edge_runtime.tuning`)."""
        return self.cache / "tuning.json"

    @property
    def prefixes(self) -> Path:
        """KV cache of prompts seen before (:mod:`edge_runtime.prefix_store`)."""
        return self.cache / "prefixes"


DURABLE = "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA cache_size=-256;"
"""How a database of SQLite is opened that must outlive a power cut; a quarter of a MiB is cached."""


def expanded(text: str) -> Path:
    """With ``~`` or ``~user`` at its beginning replaced, where there is such a user."""
    try:
        return Path(text).expanduser()
    except (RuntimeError, ValueError):  # no such user, or one whose name has a NUL in it
        return Path(text)


def private_file(path: Path) -> None:
    """Make it, if it is not there, and have it readable by its user only. OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    if path.stat().st_mode & 0o077 and os.name == "posix":  # copied from elsewhere, or of an older version
        path.chmod(0o600)


def home() -> Home:
    """By EDGE_GLM_HOME if it is set, else the platform's folders. ConfigError if it is not an absolute path."""
    given = os.environ.get("EDGE_GLM_HOME")
    if given:
        path = expanded(given)
        if not path.is_absolute():
            raise ConfigError(f"EDGE_GLM_HOME must be an absolute path, not {given!r}")
        return Home(path, path / "cache")
    import platformdirs

    return Home(platformdirs.user_data_path(APP, appauthor=False), platformdirs.user_cache_path(APP, appauthor=False))
