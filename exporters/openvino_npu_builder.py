"""The network as OpenVINO's NPU plugin takes it: the same stateful graph, with weights of its own."""

from __future__ import annotations

from exporters.openvino_builder import OpenVinoBuilder
from exporters.openvino_weights import View, float_matrix, symmetric_matrix
from exporters.weights import QuantizedTensor, Tensor, dequantize


class OpenVinoNpuBuilder(OpenVinoBuilder):
    """As its base, for matrices as :class:`exporters.npu_weights.NpuCheckpoint` gives them."""

    levels = (4,)

    def _matrix(self, tensor: Tensor, exact: bool = False) -> View:
        if isinstance(tensor, QuantizedTensor):
            return symmetric_matrix(self._store, tensor)
        return float_matrix(self._store, dequantize(tensor), half=True)
