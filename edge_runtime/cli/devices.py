"""``edge-glm devices``."""

from __future__ import annotations

import argparse
import json
from typing import Any

from devices.discovery import Device, Facts, facts, list_devices
from devices.host import Memory, cores, host_memory, instructions, processor
from edge_runtime.columns import columns
from edge_runtime.memory import format_bytes


def devices(arguments: argparse.Namespace) -> int:
    found = [(device, facts(device)) for device in list_devices()]
    print(json.dumps([_row(*each) for each in found], indent=2) if arguments.json else _table(found))
    return 0


def _row(device: Device, known: Facts) -> dict[str, Any]:
    memory = known.memory
    return {
        "name": device.name,
        "engine": device.engine,
        "hardware": device.hardware,
        "ready": device.ready,
        "problem": device.problem,
        "memory": None if memory is None else {"total_bytes": memory.total, "free_bytes": memory.free},
        "instructions": list(known.instructions),
        "versions": dict(known.versions),
    }


def _table(found: list[tuple[Device, Facts]]) -> str:
    """The machine, the devices that are ready, and the others with what is in the way."""
    memory, has = host_memory(), ", ".join(instructions())
    lines = [f"{processor()}, {cores()} cores{has and ', '}{has}, {_free(memory)}", ""]
    rows = []
    for device, known in found:
        if device.ready:
            own = [] if known.memory is None or known.instructions else [_free(known.memory)]
            said = [device.hardware, *own, *(f"{name} {number}" for name, number in known.versions)]
            rows.append([device.name, "ready", ", ".join(said)])
    rows += [[device.name, "-", device.problem or ""] for device, _ in found if not device.ready]
    return "\n".join([*lines, columns(rows, "l")])


def _free(memory: Memory) -> str:
    return f"{format_bytes(memory.free)} of {format_bytes(memory.total)} free"
