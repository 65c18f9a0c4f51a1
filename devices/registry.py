"""How a device's name becomes an open decoder.

A device is an engine and the hardware it runs on, written ``engine:hardware`` (``openvino:cpu``); ``edge`` is ONNX
Runtime with operators of our own. Short names (``cpu``, ``auto``, …) stand for several: :mod:`devices.names`. Which of
them can be used here :mod:`devices.discovery` finds out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from devices.discovery import Device, probe_device
from devices.errors import DeviceUnavailable
from devices.names import KNOWN, OPTIONAL, parse_device

if TYPE_CHECKING:
    from devices.base import Decoder, DecoderOptions, DecoderSpec, Engine


class Choice(NamedTuple):
    device: Device
    passed_over: tuple[str, ...]
    """Why each of the better candidates was not taken."""


def choose_device(name: str, engines: Collection[str] | None = None) -> Device:
    """The best usable device that ``name`` stands for, among those of ``engines`` (None: any).

    UnknownDevice, or DeviceUnavailable naming why each candidate is not usable.
    """
    return choose(name, parse_device(name), engines).device


def choose(
    name: str,
    candidates: Sequence[str],
    engines: Collection[str] | None = None,
    aside: Mapping[str, str] = MappingProxyType({}),
) -> Choice:
    """The first of ``candidates`` that can be used, for ``name`` as it was asked for.

    ``engines``: those that the model has a variant for (None: any). ``aside``: devices that are not to be taken, and
    why. DeviceUnavailable as for :func:`choose_device`.
    """
    reasons: dict[str, str] = {}
    meant = parse_device(name)
    named = meant if len(meant) == 1 else ()
    for candidate in candidates:
        engine = KNOWN[candidate].engine
        if candidate in aside:
            reasons[candidate] = aside[candidate]
        elif candidate in OPTIONAL and candidate not in named and probe_device(candidate).problem is not None:
            continue  # nobody misses it
        elif engines is not None and engine not in engines:
            reasons[candidate] = f"the model has no {engine} variant (export --engine {_export_name(engine)})"
            if candidate in named:  # who names it wants to know why not; for others it takes too long
                reasons[candidate] = probe_device(candidate).problem or reasons[candidate]
        else:
            device = probe_device(candidate)
            if device.problem is None:
                return Choice(device, tuple(f"{name}: {reason}" for name, reason in reasons.items()))
            reasons[candidate] = device.problem
    for candidate in reasons.keys() - aside.keys():  # an export would not help where the device is not here either
        reasons[candidate] = probe_device(candidate).problem or reasons[candidate]
    told = "; ".join(f"{candidate}: {reason}" for candidate, reason in reasons.items())
    raise DeviceUnavailable(f"device {name!r} cannot be used here: {told}")


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
    if chosen.engine == "onnxruntime-coreml":
        from devices.onnxruntime_coreml import OnnxRuntimeCoreMLDecoder

        return OnnxRuntimeCoreMLDecoder(spec, options, emulated=chosen.name == "onnxruntime:coreml-emulated")
    if chosen.engine == "onnxruntime-cuda":
        from devices.onnxruntime_cuda import OnnxRuntimeCudaDecoder

        return OnnxRuntimeCudaDecoder(spec, options)
    if chosen.name == "onnxruntime:webgpu":
        from devices.onnxruntime_webgpu import OnnxRuntimeWebGpuDecoder

        return OnnxRuntimeWebGpuDecoder(spec, options)
    if chosen.engine == "onnxruntime-edge":
        from devices.onnxruntime_edge import OnnxRuntimeEdgeDecoder

        return OnnxRuntimeEdgeDecoder(spec, options)
    from devices.onnxruntime_open import open_onnxruntime

    return open_onnxruntime(spec, options, chosen.name)
