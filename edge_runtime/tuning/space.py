"""What may be tried: for each lever, the setups that differ from the present one in nothing else.

Quality is no lever. Weights stay as they were asked for, precision hints are not touched (:mod:`devices.hints`), and an
8-bit KV cache, which costs about one next-token choice in a hundred, is tried only where that was allowed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import msgspec

from devices.base import DecoderOptions
from devices.hints import hints, pinning, pinning_choices
from devices.host import cores, physical_cores
from devices.kv_types import KVType
from devices.names import KNOWN
from edge_runtime.measurements import Shape
from edge_runtime.package import Weights
from edge_runtime.tuning.records import Options, Setup

HISTORY = "history"
"""The lever that is what earlier runs found."""
CHUNKS = (128, 512, 1024)
"""Tokens of a prompt run at once, beside the default."""
_KV_TYPES: dict[str, tuple[KVType, ...]] = {"edge:cpu": ("int8",), "openvino:cpu": ("int8", "float16")}
"""Those that a device has beside its own choice and that may be faster."""


@dataclass(frozen=True)
class Scope:
    """Within what is searched."""

    devices: tuple[str, ...]
    """Those for which the package has a variant with the same weights, the default's too."""
    shape: Shape
    weights: Weights
    int8_kv: bool = False
    """Whether answers may change for an 8-bit KV cache."""
    budget: bool = False
    """Memory is short: nothing that may take more of it than the default."""
    history: tuple[Setup, ...] = ()
    """What earlier runs found."""


def levers(scope: Scope) -> Iterator[str]:
    """Names for :func:`challengers`, the most promising first. Hints are those of all devices."""
    yield from (HISTORY, "device", "threads", "chunk", "KV cache", "pinning")
    yield from dict.fromkeys(name for device in scope.devices for name in hints(device))


def challengers(lever: str, setup: Setup, scope: Scope) -> list[Setup]:
    """What else ``lever`` can be than it is in ``setup``."""
    if lever == HISTORY:
        found = [each for each in scope.history if each.device in scope.devices]
    elif lever == "device":
        found = [Setup(device) for device in scope.devices if device != setup.device]
    else:
        options = setup.options
        found = [
            Setup(setup.device, msgspec.structs.replace(options, **change)) for change in _changes(lever, setup, scope)
        ]
    allowed = [each for each in found if each != setup and _allowed(each.options, scope)]
    return [each for index, each in enumerate(allowed) if each not in allowed[:index]]


def _allowed(options: Options, scope: Scope) -> bool:
    if options.kv_type == "int8" and not scope.int8_kv:
        return False
    return not scope.budget or options == options.frugal()


def _changes(lever: str, setup: Setup, scope: Scope) -> list[dict[str, object]]:
    device = setup.device
    if lever == "threads":
        return [{"threads": count} for count in _thread_counts(device)]
    if lever == "chunk":
        longest = scope.shape.prompt_tokens
        return [
            {"prefill_chunk": chunk} for chunk in CHUNKS if chunk <= longest or chunk < DecoderOptions.prefill_chunk
        ]
    if lever == "KV cache":
        return [{"kv_type": kind} for kind in _kv_types(device, scope)]
    if lever == "pinning":
        return [{"pinning": pinned} for pinned in pinning_choices(device)]
    ways = hints(device).get(lever, ())
    others = {name: value for name, value in setup.options.properties.items() if not any(name in way for way in ways)}
    return [{"properties": {**others, **way}} for way in ways]


def _thread_counts(device: str) -> list[int]:
    if not device.endswith(":cpu"):
        return []
    physical = physical_cores()
    return sorted({1, max(physical // 2, 1), physical, cores()})


def _kv_types(device: str, scope: Scope) -> list[KVType]:
    """16 bits lose nothing where the engine would take 8, which it does unless the weights are fp32."""
    return [kind for kind in _KV_TYPES.get(device, ()) if kind == "int8" or scope.weights != "fp32"]


def changes_answers(setup: Setup, default: Setup) -> bool:
    """Whether what is computed may differ from the default's by more than the order of a sum."""
    ours, theirs = setup.options, default.options
    return (
        setup.device != default.device or ours.kv_type != theirs.kv_type or ours.prefill_chunk != theirs.prefill_chunk
    )


def problem(setup: Setup) -> str | None:
    """Why it is not one of those that this module offers on this machine; None: it is."""
    device, options = setup.device, setup.options
    if device not in KNOWN:
        return f"there is no device {device!r}"
    if options.threads not in (None, *_thread_counts(device)):
        return f"{options.threads} threads are not tried here"
    if options.prefill_chunk not in (None, *CHUNKS):
        return f"chunks of {options.prefill_chunk} tokens are not tried"
    if options.kv_type not in (None, *_KV_TYPES.get(device, ())):
        return f"{device} is not tried with a KV cache of {options.kv_type}"
    known = [pair for ways in hints(device).values() for way in ways for pair in way.items()]
    strange = [f"{name}={value}" for name, value in options.properties.items() if (name, value) not in known]
    return f"{device} takes no {strange[0]}" if strange else None


def opened(setup: Setup, given: DecoderOptions) -> DecoderOptions:
    """``given`` with the options of ``setup`` where it leaves the choice to the device.

    Threads that are given are not bound to cores: how many they are was not tried.
    """
    options = setup.options
    threads, properties = given.threads, dict(options.properties)
    if threads is None:
        threads = options.threads
        if options.pinning is not None:
            threads, bound = pinning(setup.device, options.pinning, threads)
            properties |= bound
    return replace(
        given,
        threads=threads,
        prefill_chunk=options.prefill_chunk or given.prefill_chunk,
        kv_type=given.kv_type or options.kv_type,
        properties={**properties, **given.properties},
    )
