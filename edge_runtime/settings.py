"""Settings: flags beat EDGE_GLM_* variables beat edge-glm.toml."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from devices.kv_types import KVWish
from edge_runtime.errors import ConfigError
from edge_runtime.measurements import Workload
from edge_runtime.package import Weights, WeightsWish
from edge_runtime.paths import APP
from edge_runtime.prefix_store import DEFAULT_SIZE
from edge_runtime.step_watch import STEP_TIMEOUT_S

PREFIX = "EDGE_GLM_"
FILE = "edge-glm.toml"
_OTHER_VARIABLES = frozenset({"EDGE_GLM_HOME", "EDGE_GLM_CONFIG"})


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What may be set in all three places, under the same names (flags with ``-``, variables in capitals)."""

    model: str | None = None
    """What ``serve`` serves without a reference."""
    device: str = "auto"
    fallback: bool = False
    weights: WeightsWish | None = None
    workload: Workload | None = None
    """What to choose a device for; ``serve`` takes many streams if nothing is said, all else one."""
    memory_budget: str | None = None
    threads: int | None = None
    kv_type: KVWish | None = None
    max_prompt: int | None = None
    """Tokens that a device with static shapes is compiled for."""
    batch_invariant: bool = False
    prompt_lookup: bool = False
    draft: str | None = None
    """A smaller model with the same vocabulary, which drafts."""
    draft_device: str | None = None
    """None: the model's."""
    prefix_store: str | int = DEFAULT_SIZE
    policy: str | None = None
    """A file that says which requests other tiers may answer."""
    offline: bool = False
    """Whether tiers on other machines are off."""
    tuning: bool = True
    """Whether to open a model as ``edge-glm tune`` found best."""
    step_timeout: float = STEP_TIMEOUT_S
    """Seconds after which a step of the model counts as hanging, at least; 0: never."""
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    allow_open: bool = False
    """Whether other machines may ask though there is no key."""
    rate_limit: int | None = None
    """Requests a minute of each key, or without keys each address."""
    max_body: str | int = "8MiB"
    keep_alive: str = "5m"
    """That a model stays open unused, which was opened on demand."""
    on_demand: bool = False
    """Whether ``serve`` offers all models of this machine beside those that are named."""
    also_on: str | list[str] = ""
    """Other devices that ``serve`` offers its models on; several in a text with commas between them."""
    max_new_tokens: int | None = None
    """Of an answer."""
    otel: bool = False
    """Whether ``serve`` sends requests' spans to an OpenTelemetry collector."""
    cors: str | list[str] = ""
    """Origins of web pages that may ask; several in a text with commas between them."""
    max_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None
    system: str | None = None

    @property
    def origins(self) -> list[str]:
        """``cors``, one by one."""
        return _one_by_one(self.cors)

    @property
    def other_devices(self) -> list[str]:
        """``also_on``, one by one."""
        return _one_by_one(self.also_on)

    @property
    def format(self) -> Weights | None:
        """``weights``, for who cannot choose them."""
        return None if self.weights == "auto" else self.weights


def _one_by_one(given: str | list[str]) -> list[str]:
    return [each.strip() for each in (given.split(",") if isinstance(given, str) else given) if each.strip()]


class Origin(msgspec.Struct, frozen=True):
    """A setting's value, and where it is from."""

    value: Any
    source: str
    """``default``, a file's path, or the environment variable's name."""


def load_settings(flags: Mapping[str, Any], environ: Mapping[str, str] | None = None) -> Settings:
    """Merge; flags that are None were not given. ConfigError names the place, the key and what is wrong."""
    merged = {name: found.value for name, found in _given(environ).items()}
    return msgspec.convert(merged | {name: value for name, value in flags.items() if value is not None}, Settings)


def origins(environ: Mapping[str, str] | None = None) -> dict[str, Origin]:
    """Every setting as it is where no flag says otherwise. ConfigError as for :func:`load_settings`."""
    defaults = msgspec.to_builtins(Settings())
    return {name: Origin(value, "default") for name, value in defaults.items()} | _given(environ)


def config_files(environ: Mapping[str, str] | None = None) -> list[Path]:
    """Where a file of settings is looked for; the first that there is counts."""
    environ = os.environ if environ is None else environ
    given = environ.get("EDGE_GLM_CONFIG")
    if given:
        return [Path(given)]
    if environ.get("EDGE_GLM_HOME"):
        return [Path(FILE), Path(environ["EDGE_GLM_HOME"]) / FILE]
    import platformdirs

    return [Path(FILE), platformdirs.user_config_path(APP, appauthor=False) / FILE]


def _given(environ: Mapping[str, str] | None) -> dict[str, Origin]:
    """By the file and by variables, which are stronger."""
    environ = os.environ if environ is None else environ
    found: dict[str, Origin] = {}
    path = _config_file(environ)
    if path is not None:
        values = _checked(_read_toml(path), str(path), strict=True)
        found |= {name: Origin(value, str(path)) for name, value in values.items()}
    values = _checked(_variables(environ), "environment", strict=False)
    return found | {name: Origin(value, PREFIX + name.upper()) for name, value in values.items()}


def _checked(values: dict[str, Any], origin: str, *, strict: bool) -> dict[str, Any]:
    try:
        settings = msgspec.convert(values, Settings, strict=strict)  # not strict: "8080" is a number
    except msgspec.ValidationError as error:
        known = ", ".join(Settings.__struct_fields__)
        raise ConfigError(f"{origin}: {error}; known settings: {known}") from error
    return {name: getattr(settings, name) for name in values}


def _variables(environ: Mapping[str, str]) -> dict[str, str]:
    names = [name for name in environ if name.startswith(PREFIX) and name not in _OTHER_VARIABLES]
    return {name.removeprefix(PREFIX).lower(): environ[name] for name in names}


def _config_file(environ: Mapping[str, str]) -> Path | None:
    """A file that is named must be there: reading it says if it is not."""
    places = config_files(environ)
    return places[0] if environ.get("EDGE_GLM_CONFIG") else next((each for each in places if each.is_file()), None)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: also for a number of thousands of digits
        raise ConfigError(f"cannot read {path}: {error}") from error
