"""A checkpoint as the graph of one engine. The engines' builders are imported only when they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import devices.base
from edge_runtime.errors import ConfigError
from exporters.builder import Builder, Levels
from exporters.checkpoint import Checkpoint
from exporters.network import build
from exporters.onnx_operators import WeightFormat

Engine = Literal["onnx", "onnx-coreml", "onnx-cuda", "openvino", "openvino-npu", "onnx-edge"]


class _NewBuilder(Protocol):
    @property
    def levels(self) -> Levels: ...

    def __call__(self, architecture: Any, weights: WeightFormat, scratch: Path | None) -> Builder[Any]: ...


def write_graph(
    checkpoint: Checkpoint,
    engine: Engine,
    weights: WeightFormat,
    folder: Path,
    scratch: Path,
    progress: Callable[[int, int], None] | None = None,
    activation_bits: int = 8,
) -> tuple[devices.base.Engine, str]:
    """Write ``checkpoint`` into ``folder``; weight files grow in ``scratch``. ``activation_bits``: of onnx-edge.
    Returns the runtime's engine and the name of the graph's file."""
    runs_on, file, builder = _builder(engine, activation_bits)
    graph = builder(checkpoint.architecture, weights, scratch)
    build(checkpoint, graph, progress)
    graph.save(folder)
    return runs_on, file


def matrix_levels(engine: Engine) -> Levels:
    """Bits that matrices of its graphs may have side by side."""
    return _builder(engine)[2].levels


def write_baseline(
    checkpoint: Checkpoint, folder: Path, scratch: Path, progress: Callable[[int, int], None] | None = None
) -> str:
    """Write ``checkpoint`` as :mod:`exporters.onnx_baseline_builder` does. Returns the name of the graph's file."""
    from exporters.onnx_baseline_builder import OnnxBaselineBuilder
    from exporters.onnx_graph import MODEL_FILE

    graph = OnnxBaselineBuilder(checkpoint.architecture, "fp32", scratch)
    build(checkpoint, graph, progress)
    graph.save(folder)
    return MODEL_FILE


def _builder(engine: Engine, activation_bits: int = 8) -> tuple[devices.base.Engine, str, _NewBuilder]:
    if engine == "onnx":
        from exporters.onnx_builder import OnnxBuilder

        return "onnxruntime", "model.onnx", OnnxBuilder
    if engine == "onnx-coreml":
        from exporters.onnx_coreml_builder import OnnxCoreMLBuilder

        return "onnxruntime-coreml", "model.onnx", OnnxCoreMLBuilder
    if engine == "onnx-cuda":
        from exporters.onnx_cuda_builder import OnnxCudaBuilder

        return "onnxruntime-cuda", "model.onnx", OnnxCudaBuilder
    if engine == "onnx-edge":
        from exporters.onnx_edge_builder import OnnxEdgeBuilder, PreciseOnnxEdgeBuilder

        return "onnxruntime-edge", "model.onnx", PreciseOnnxEdgeBuilder if activation_bits == 16 else OnnxEdgeBuilder
    if engine == "openvino":
        from exporters.openvino_builder import OpenVinoBuilder

        return "openvino", "openvino_model.xml", OpenVinoBuilder
    if engine == "openvino-npu":
        from exporters.openvino_npu_builder import OpenVinoNpuBuilder

        return "openvino-npu", "openvino_model.xml", OpenVinoNpuBuilder
    raise ConfigError(f"unknown engine {engine!r}; known: {', '.join(get_args(Engine))}")
