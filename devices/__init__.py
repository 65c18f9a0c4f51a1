"""Hardware and engines: what is here, and one :class:`~devices.base.Decoder` per engine that runs on it.

This layer imports nothing else of the project. No engine is imported until a device is opened or listed.
"""

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
