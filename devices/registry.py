"""How a device's name becomes an open decoder.

A device is an engine and the hardware it runs on, written ``engine:hardware`` (``openvino:cpu``); ``edge`` is ONNX
Runtime with operators of our own. Short names (``cpu``, ``auto``, …) stand for several: :mod:`devices.names`. Which of
them can be used here :mod:`devices.discovery` finds out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, NamedTuple

from devices.discovery import Device, probe_device
from devices.errors import DeviceUnavailable
from devices.names import KNOWN, parse_device

if TYPE_CHECKING:
    from devices.base import Decoder, DecoderOptions, DecoderSpec, Engine

Order = Callable[[Sequence[str]], Sequence[str]]
"""Names of devices, best first → the same in another order."""


class Choice(NamedTuple):
    device: Device
    passed_over: tuple[str, ...]
    """Why each of the better candidates was not taken."""


def choose_device(
    name: str = "auto", engines: Collection[str] | None = None, order: Order = lambda names: names
) -> Device:
    """The device of :func:`choose`."""
    return choose(name, engines, order).device


def choose(name: str = "auto", engines: Collection[str] | None = None, order: Order = lambda names: names) -> Choice:
    """The best usable device that ``name`` stands for, among those of ``engines`` (None: any).

    ``order`` puts the candidates in another order than :data:`devices.names.PREFERENCE`'s, as measurements may.

    UnknownDevice, or DeviceUnavailable naming why each candidate is not usable.
    """
    reasons = []
    for candidate in order(parse_device(name)):
        engine = KNOWN[candidate].engine
        if engines is not None and engine not in engines:
            reasons.append(f"{candidate}: the model has no {engine} variant (export --engine {_export_name(engine)})")
            continue
        device = probe_device(candidate)
        if device.problem is None:
            return Choice(device, tuple(reasons))
        reasons.append(f"{candidate}: {device.problem}")
    raise DeviceUnavailable(f"device {name!r} cannot be used here: " + "; ".join(reasons))


def _export_name(engine: Engine) -> str:
    """What ``edge-glm export --engine`` calls it."""
    return engine.replace("onnxruntime", "onnx")


def open_decoder(spec: DecoderSpec, device: str, options: DecoderOptions) -> Decoder:
    """Open ``spec`` on ``device``. UnknownDevice, DeviceUnavailable, EngineError."""
    chosen = choose_device(device, {spec.engine})
    if chosen.engine == "openvino":
        from devices.openvino_open import open_openvino

        return open_openvino(spec, options, device=KNOWN[chosen.name].own_name)
    if chosen.engine == "openvino-npu":
        from devices.openvino_npu import OpenVinoNpuDecoder

        return OpenVinoNpuDecoder(spec, options, emulated=chosen.name == "openvino:npu-emulated")
    if chosen.engine == "onnxruntime-cuda":
        from devices.onnxruntime_cuda import OnnxRuntimeCudaDecoder

        return OnnxRuntimeCudaDecoder(spec, options)
    if chosen.engine == "onnxruntime-edge":
        from devices.onnxruntime_edge import OnnxRuntimeEdgeDecoder

        return OnnxRuntimeEdgeDecoder(spec, options)
    from devices.onnxruntime_gqa import OnnxRuntimeDecoder

    return OnnxRuntimeDecoder(spec, options)
