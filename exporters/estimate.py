"""How large the files of an export will be, from the shapes of a model's tensors."""

from __future__ import annotations

import math

from edge_runtime.package import Weights
from exporters.checkpoint import Checkpoint
from exporters.gguf_checkpoint import GgufCheckpoint
from exporters.graphs import Engine
from exporters.hf_names import tensor_shape
from exporters.network import tensor_names

_GROUP = 32
_CONSTANTS: dict[Engine, dict[int, float]] = {
    # a scale and a zero point for each group; where GGUF's zero points are fractional there are columns more
    "onnx": {4: 4.5, 8: 4},
    "onnx-cuda": {4: 4.5, 8: 4},
    "onnx-edge": {4: 4, 8: 2},
    "openvino": {4: 2.5, 8: 2},
    "openvino-npu": {4: 0.5, 8: 0},
}
"""Bytes beside the codes of a group, by their bits."""
_FRACTIONAL: dict[Engine, float] = {"onnx": 1.28, "onnx-cuda": 1.28, "openvino": 1}
"""Bytes more where zero points are no integers, as in GGUF's Q4_1 and Q4_K."""
_KINDS_OF_8_BITS = frozenset({"Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0"})
_FRACTIONAL_KINDS = frozenset({"Q4_1", "Q4_K", "Q5_1", "Q5_K"})


def estimated_bytes(checkpoint: Checkpoint, engine: Engine, weights: Weights) -> int:
    """Within a few hundredths of what :func:`exporters.export.export` writes; the tensors are not read."""
    arch = checkpoint.architecture
    ropes = {layer.rope for layer in arch.layers if layer.rope is not None}
    tables = sum(rope.rotary_dim * (1 if rope.long_inv_freq is None else 2) for rope in ropes)
    total = 0.0 if engine == "openvino" else 4.0 * arch.max_context * tables  # cosines and sines of every position
    for name in tensor_names(arch):
        shape = tensor_shape(arch, name)
        values = math.prod(shape)
        if len(shape) == 1 or weights == "fp32":
            total += 4 * values
        elif weights == "fp16":
            total += (4 if engine == "onnx" else 2) * values
        else:
            kind = checkpoint.kind(name) if isinstance(checkpoint, GgufCheckpoint) else ""
            eight = weights == "int8" or kind in _KINDS_OF_8_BITS or (not kind.startswith("Q4") and _outer(name))
            bits = 8 if eight else 4
            beside = _CONSTANTS[engine][bits] + (_FRACTIONAL.get(engine, 0) if kind in _FRACTIONAL_KINDS else 0)
            total += values * (bits / 8 + beside / _GROUP)
    return int(total)


def _outer(name: str) -> bool:
    """Embedding and head have 8 bits in int4 too."""
    return name in ("embed", "head")
