"""Every error Edge-GLM raises on purpose, in one tree.

::

    EdgeError
    ├── DeviceError                  (devices.errors)
    │   ├── UnknownDevice            no such device name
    │   ├── DeviceUnavailable        known, but not usable here
    │   ├── EngineError              the engine refused or failed
    │   ├── OutOfSequences           max_sequences open
    │   ├── OutOfKVCache             no KV cache left for the step
    │   └── ContextOverflow          a sequence would pass the context
    ├── ModelError                   a model cannot be had or used
    │   ├── UnknownReference         the reference has no known form or names nothing
    │   ├── ModelNotFound            not on this machine
    │   ├── FetchError               the registry or hub did not give it
    │   ├── UnsupportedModel         family, field or tensor type we do not run; named
    │   ├── CorruptModel             truncated, wrong hash, contradictory
    │   └── StorageError             disk full, not writable
    ├── RequestError                 the request is at fault (HTTP 400)
    │   ├── InvalidRequest           unknown or mistyped field, empty messages; ``param`` names it
    │   ├── PromptTooLong            prompt (+ max_tokens) over the context; both counts
    │   └── TemplateError            the chat template failed or was stopped
    ├── BudgetError                  the memory budget cannot work; says what would
    ├── Overloaded                   queue full (HTTP 503, ``retry_after``)
    ├── EngineStopped                the engine is shut down or its thread died
    └── ConfigError                  flags, environment or edge-glm.toml
"""

from __future__ import annotations

from devices.errors import (
    ContextOverflow,
    DeviceError,
    DeviceUnavailable,
    EdgeError,
    EngineError,
    OutOfKVCache,
    OutOfSequences,
    UnknownDevice,
)


class ModelError(EdgeError):
    """A model cannot be had or used."""


class UnknownReference(ModelError):
    """The reference has no known form, or names nothing."""


class ModelNotFound(ModelError):
    """The model is not on this machine."""


class FetchError(ModelError):
    """The package index, hub or network did not deliver."""


class UnsupportedModel(ModelError):
    """A family, configuration field or tensor type that is not run; the message names it."""


class CorruptModel(ModelError):
    """A file is truncated, contradicts itself or does not match its recorded hash."""


class StorageError(ModelError):
    """The disk is full or not writable."""


class RequestError(EdgeError):
    """The request is at fault. ``param`` names the offending field where there is one."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class InvalidRequest(RequestError):
    """An unknown, missing or mistyped field, or a value outside its range."""


class PromptTooLong(RequestError):
    """The prompt does not fit the context; the message names both counts."""


class TemplateError(RequestError):
    """The chat template failed, reached outside its sandbox or ran past its limits."""


class BudgetError(EdgeError):
    """The memory budget cannot work; the message says what would."""


class Overloaded(EdgeError):
    """The queue is full. ``retry_after`` is in seconds."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineStopped(EdgeError):
    """The engine has been shut down, or its thread died."""


class ConfigError(EdgeError):
    """A flag, environment variable or configuration file is wrong."""


__all__ = [
    "BudgetError",
    "ConfigError",
    "ContextOverflow",
    "CorruptModel",
    "DeviceError",
    "DeviceUnavailable",
    "EdgeError",
    "EngineError",
    "EngineStopped",
    "FetchError",
    "InvalidRequest",
    "ModelError",
    "ModelNotFound",
    "OutOfKVCache",
    "OutOfSequences",
    "Overloaded",
    "PromptTooLong",
    "RequestError",
    "StorageError",
    "TemplateError",
    "UnknownDevice",
    "UnknownReference",
    "UnsupportedModel",
]
