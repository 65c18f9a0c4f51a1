"""The graph of :mod:`exporters.onnx_builder` for ONNX Runtime's WebGPU provider: activations are floats."""

from __future__ import annotations

from exporters.onnx_builder import OnnxBuilder


class OnnxWebGpuBuilder(OnnxBuilder):
    """As :class:`OnnxBuilder`, but no product takes int8 activations: this provider rounds them more coarsely than the
    CPU's (SmolLM2 Q4_1: log probabilities 0.29 from fp32's instead of 0.07, root mean square)."""

    _accuracy_level = 1
