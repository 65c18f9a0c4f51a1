"""Weights in the layouts that Intel's NPU keeps compressed: symmetric 4-bit integers, or float16.

The NPU knows no zero points, and groups of 128 columns or whole rows only (docs.openvino.ai, "NPU with OpenVINO
GenAI": ``--sym --group-size 128``, or −1 for models over 4 to 5 billion parameters). So the 4-bit blocks of a GGUF file
cannot be carried over: they are rounded a second time. With SmolLM2-135M Q4_1 that costs 2.6 % and 4.2 % of the mean
negative log-likelihood on the texts of tests/bench/fidelity.py (fp16: nothing); with whole rows of 4 bits, as 128 does
not divide its 576 columns, it would be 10 % and 19 %.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import ConfigError
from edge_runtime.package import Weights
from exporters.checkpoint import Checkpoint, CheckpointView
from exporters.network import parameters
from exporters.quantize import QuantizedCheckpoint
from exporters.weights import QuantizedTensor, Tensor, dequantize

FORMATS: tuple[Weights, ...] = ("int4", "fp16")
GROUP = 128
GROUPED_UP_TO = 5_000_000_000
"""Parameters; larger models have a scale per row."""
_CHUNK_VALUES = 1 << 22


class NpuCheckpoint(CheckpointView):
    """``base`` with its matrices in ``weights``, int4 or fp16; ConfigError for another.

    int4: groups of 128 columns; above 5 billion parameters whole rows. Matrices that 128 does not divide, as some of
    the smallest models have, and embedding and head, which matter most, get whole rows of 8 bits.
    """

    def __init__(self, base: Checkpoint, weights: str) -> None:
        if weights not in FORMATS:
            raise ConfigError(f"the NPU takes weights as {' or '.join(FORMATS)}, not {weights}; choose --weights int4")
        super().__init__(base)
        self._half = QuantizedCheckpoint(base, "fp16") if weights == "fp16" else None
        self._grouped = parameters(base.architecture) <= GROUPED_UP_TO

    def tensor(self, name: str) -> Tensor:
        if self._half is not None:
            return self._half.tensor(name)
        value = self._base.tensor(name)
        if not isinstance(value, QuantizedTensor) and value.ndim == 1:
            return value
        if self._grouped and is_npu_form(value):
            return value
        cols = value.shape[1]
        if name in ("embed", "head") or (self._grouped and cols % GROUP):
            return symmetric(value, 8, cols)
        return symmetric(value, 4, GROUP if self._grouped else cols)


def is_npu_form(tensor: Tensor) -> bool:
    """A recipe has made it so: it is not rounded a second time."""
    return (
        isinstance(tensor, QuantizedTensor)
        and tensor.bits == 4
        and tensor.group == GROUP
        and bool((tensor.zero == 8).all())
    )


def symmetric(tensor: Tensor, bits: int, group: int) -> QuantizedTensor:
    """A (rows, cols) matrix rounded to ``bits`` around the code 2**(bits − 1); ``group`` columns share a scale.

    The value of largest magnitude in a group becomes the lowest code, so that all are used; scales may be negative, and
    are float16's.
    """
    rows, cols = tensor.shape
    middle = np.float32(2 ** (bits - 1))
    codes = np.empty((rows, cols), np.uint8)
    scale = np.empty((rows, cols // group), np.float32)
    step = max(_CHUNK_VALUES // cols, 1)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        codes[part], scale[part] = _round(_rows(tensor, part).reshape(-1, cols // group, group), middle)
    return QuantizedTensor(codes, scale, np.full_like(scale, middle), bits)


def _rows(tensor: Tensor, part: slice) -> NDArray[np.float32]:
    return dequantize(tensor.take_rows(part) if isinstance(tensor, QuantizedTensor) else tensor[part])


def _round(grouped: NDArray[np.float32], middle: np.float32) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Codes (rows, cols) and scales (rows, groups)."""
    largest = np.abs(grouped).argmax(-1, keepdims=True)
    scale = (np.take_along_axis(grouped, largest, -1) / -middle).astype(np.float16).astype(np.float32)
    scale = np.where(scale == 0, np.float32(1), scale)  # a group of zeros, or of values too small for float16
    codes = np.clip(np.rint(grouped / scale), -middle, middle - 1) + middle
    return codes.astype(np.uint8).reshape(len(grouped), -1), scale[..., 0]
