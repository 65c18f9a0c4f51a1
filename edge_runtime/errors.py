"""Every error Edge-GLM raises on purpose, in one tree.

::

    EdgeError
    ├── DeviceError                  (devices.errors)
    │   ├── UnknownDevice            no such device name
    │   ├── DeviceUnavailable        known, but not usable here
    │   ├── EngineError              the engine refused or failed
    │   │   └── StepTimeout          it hangs
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
    ├── NotMeasured                  too little was measured on this machine; says what to run
    ├── Overloaded                   queue full (HTTP 503, ``retry_after``)
    │   └── QueueFull                no room for another deferred request
    ├── EngineStopped                the engine is shut down or its thread died
    ├── TierError                    a tier elsewhere did not answer; ``tier`` names it
    │   ├── TierUnavailable          nothing was sent: offline, its circuit breaker is open, a cost cap, privacy
    │   ├── TierFailed               the network, its server or what it sent
    │   └── TierRefused              its server says that the request is at fault
    ├── LedgerError                  the ledger cannot be written or contradicts itself: nothing is sent
    └── ConfigError                  flags, environment or edge-glm.toml
        └── PolicyError              the policy file; the one before stays in force
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


class StepTimeout(EngineError):
    """A step takes so long that its thread is given up."""


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


class NotMeasured(EdgeError):
    """Too little was measured on this machine to say how long something takes; the message says what to run."""


class Overloaded(EdgeError):
    """The queue is full. ``retry_after`` is in seconds."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineStopped(EdgeError):
    """The engine has been shut down, or its thread died."""


class TierError(EdgeError):
    """A tier elsewhere did not answer. ``tier`` is its name."""

    def __init__(self, message: str, tier: str = "") -> None:
        super().__init__(message)
        self.tier = tier


class TierUnavailable(TierError):
    """A tier may not be asked now: offline, its circuit breaker is open, a cost cap or privacy. Nothing was sent."""


class TierFailed(TierError):
    """The network, a tier's server or what it sent. ``retry_after``: seconds that it asks for."""

    def __init__(self, message: str, tier: str = "", retry_after: float | None = None) -> None:
        super().__init__(message, tier)
        self.retry_after = retry_after


class TierRefused(TierError):
    """A tier's server says that the request is at fault: trying again there changes nothing. ``status`` is HTTP's."""

    def __init__(self, message: str, tier: str = "", status: int = 400) -> None:
        super().__init__(message, tier)
        self.status = status


class LedgerError(EdgeError):
    """The ledger of what leaves the device cannot be written, so that nothing may; or it contradicts itself."""


class QueueFull(Overloaded):
    """No room for another deferred request."""


class ConfigError(EdgeError):
    """A flag, environment variable or configuration file is wrong."""


class PolicyError(ConfigError):
    """The policy file is wrong; where one is in force, it stays."""


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
    "LedgerError",
    "ModelError",
    "ModelNotFound",
    "NotMeasured",
    "OutOfKVCache",
    "OutOfSequences",
    "Overloaded",
    "PolicyError",
    "PromptTooLong",
    "QueueFull",
    "RequestError",
    "StepTimeout",
    "StorageError",
    "TemplateError",
    "TierError",
    "TierFailed",
    "TierRefused",
    "TierUnavailable",
    "UnknownDevice",
    "UnknownReference",
    "UnsupportedModel",
]
