"""Which decoder an ONNX graph for the CPU needs: ours, or that of onnxruntime-genai's form."""

from __future__ import annotations

from devices.base import Decoder, DecoderOptions, DecoderSpec
from devices.errors import EngineError
from devices.onnxruntime_genai import OnnxRuntimeGenaiDecoder
from devices.onnxruntime_gqa import OnnxRuntimeDecoder

_OURS, _THEIRS = b"query_seqlens", b"attention_mask"
"""Inputs by which they are told apart."""


def open_onnxruntime(spec: DecoderSpec, options: DecoderOptions, device: str) -> Decoder:
    """DeviceUnavailable if ``device`` cannot be used, EngineError if the model cannot be read or is refused."""
    try:
        graph = spec.model.read_bytes()
    except OSError as error:
        raise EngineError(f"cannot read {spec.model}: {error}; export the model again") from error
    if _THEIRS in graph and _OURS not in graph:
        return OnnxRuntimeGenaiDecoder(spec, options, device)
    return OnnxRuntimeDecoder(spec, options, device)
