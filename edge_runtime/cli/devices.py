"""``edge-glm devices``."""

from __future__ import annotations

import argparse
import json

from devices.registry import list_devices


def devices(arguments: argparse.Namespace) -> int:
    found = list_devices()
    if arguments.json:
        rows = [
            {
                "name": device.name,
                "engine": device.engine,
                "hardware": device.hardware,
                "ready": device.ready,
                "problem": device.problem,
            }
            for device in found
        ]
        print(json.dumps(rows, indent=2))
        return 0
    width = max(len(device.name) for device in found)
    for device in found:
        state = f"ready  {device.hardware}" if device.problem is None else f"-      {device.problem}"
        print(f"{device.name:{width}}  {state}")
    return 0
