"""Which OpenVINO decoder a model needs."""

from __future__ import annotations

from devices.base import Decoder, DecoderOptions, DecoderSpec
from devices.errors import EngineError
from devices.openvino_dense import OpenVinoDenseDecoder
from devices.openvino_paged import OpenVinoDecoder

_FUSED_ATTENTION = b'type="ScaledDotProductAttention"'


def open_openvino(spec: DecoderSpec, options: DecoderOptions, device: str = "CPU") -> Decoder:
    """PagedAttention where the graph's attention is the fused operator, else a dense cache per sequence.

    EngineError when the model cannot be read or opened.
    """
    try:
        fused = _FUSED_ATTENTION in spec.model.read_bytes()
    except OSError as error:
        raise EngineError(f"cannot read {spec.model}: {error}; export the model again") from error
    return OpenVinoDecoder(spec, options, device) if fused else OpenVinoDenseDecoder(spec, options, device)
