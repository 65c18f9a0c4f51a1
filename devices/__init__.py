"""Hardware and engines: what is here, and one :class:`~devices.base.Decoder` per engine that runs on it.

This layer imports nothing else of the project. No engine is imported until a device is opened or listed.
"""

import os

# ONNX Runtime 1.32 for Linux comes with telemetry: when it is imported it writes an id of the machine and a database of
# events into the user's cache folder, for mobile.events.data.microsoft.com (core/platform/posix/telemetry_1ds.cc).
# Nothing leaves this machine that its owner has not sent.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from devices.base import Decoder, DecoderLimits, DecoderOptions, DecoderSequence, DecoderSpec, Snapshot, Step
from devices.discovery import Device, list_devices
from devices.errors import DeviceError, EdgeError
from devices.registry import open_decoder

__all__ = [
    "Decoder",
    "DecoderLimits",
    "DecoderOptions",
    "DecoderSequence",
    "DecoderSpec",
    "Device",
    "DeviceError",
    "EdgeError",
    "Snapshot",
    "Step",
    "list_devices",
    "open_decoder",
]
