"""An encoder as an ONNX graph of standard operators, which both engines read.

Inputs: ``input_ids`` [texts, tokens] int64, right-padded; ``mask`` [texts, tokens] float32, 1 for tokens and 0 for
padding; ``position_ids`` [tokens] int64, rows of the table of positions. Output: ``embedding`` [texts, hidden] float32,
pooled, and of length 1 where the model wants that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from exporters.encoder.checkpoint import EncoderCheckpoint
from exporters.onnx_graph import MODEL_FILE, OnnxGraph

EncoderWeights = Literal["fp32", "fp16"]
_FLOAT = 1  # onnx.TensorProto.FLOAT
_HIDDEN = -1e9
"""Added to the scores of padding."""
_SMALLEST = 1e-12
"""Length below which a vector is not stretched, as in torch.nn.functional.normalize."""


def write_encoder(checkpoint: EncoderCheckpoint, folder: Path, scratch: Path, weights: EncoderWeights) -> str:
    """Returns the name of the graph's file. StorageError, CorruptModel."""
    _Encoder(checkpoint, scratch, weights).write().save(folder, "edge-glm", {"weights": weights})
    return MODEL_FILE


class _Encoder:
    def __init__(self, checkpoint: EncoderCheckpoint, scratch: Path, weights: EncoderWeights) -> None:
        self._checkpoint = checkpoint
        self._arch = checkpoint.architecture
        self._graph = OnnxGraph(self._arch.family, scratch)
        self._half = weights == "fp16"

    def write(self) -> OnnxGraph:
        graph, arch = self._graph, self._arch
        ids = graph.input("input_ids", np.int64, ["texts", "tokens"])
        mask = graph.input("mask", np.float32, ["texts", "tokens"])
        places = graph.input("position_ids", np.int64, ["tokens"])
        words = self._table("word_embeddings", arch.vocab_size, ids)
        rows = self._table("position_embeddings", arch.positions, places)
        kinds = self._checkpoint.tensor("embeddings.token_type_embeddings.weight", -1, arch.hidden_size)
        x = graph.one("Add", [graph.one("Add", [words, rows]), graph.constant(kinds[0])])
        x = self._norm(x, "embeddings.LayerNorm")
        padding = graph.one("Mul", [graph.one("Sub", [graph.scalar(1.0), mask]), graph.scalar(_HIDDEN)])
        padding = graph.one("Unsqueeze", [padding, graph.ints(1, 2)])
        for index in range(arch.num_layers):
            x = self._layer(x, padding, f"encoder.layer.{index}")
        y = self._pooled(x, graph.one("Unsqueeze", [mask, graph.ints(-1)]))
        if arch.normalize:
            length = graph.one("ReduceL2", [y, graph.ints(-1)], keepdims=1)
            y = graph.one("Div", [y, graph.one("Max", [length, graph.scalar(_SMALLEST)])])
        graph.node("Identity", [y], ["embedding"])
        graph.output("embedding", np.float32, ["texts", arch.hidden_size])
        return graph

    def _layer(self, x: str, padding: str, prefix: str) -> str:
        graph, arch = self._graph, self._arch
        heads, dim = arch.num_heads, arch.head_dim
        parts = []
        for name, perm in (("query", [0, 2, 1, 3]), ("key", [0, 2, 3, 1]), ("value", [0, 2, 1, 3])):
            y = self._dense(x, f"{prefix}.attention.self.{name}", arch.hidden_size, arch.hidden_size)
            y = graph.one("Reshape", [y, graph.ints(0, 0, heads, dim)])
            parts.append(graph.one("Transpose", [y], perm=perm))
        query, key, value = parts
        scores = graph.one("Mul", [graph.one("MatMul", [query, key]), graph.scalar(dim**-0.5)])
        weights = graph.one("Softmax", [graph.one("Add", [scores, padding])], axis=-1)
        y = graph.one("Transpose", [graph.one("MatMul", [weights, value])], perm=[0, 2, 1, 3])
        y = graph.one("Reshape", [y, graph.ints(0, 0, arch.hidden_size)])
        y = self._dense(y, f"{prefix}.attention.output.dense", arch.hidden_size, arch.hidden_size)
        x = self._norm(graph.one("Add", [x, y]), f"{prefix}.attention.output.LayerNorm")
        y = self._dense(x, f"{prefix}.intermediate.dense", arch.intermediate_size, arch.hidden_size)
        y = graph.one("Gelu", [y], approximate=arch.gelu)
        y = self._dense(y, f"{prefix}.output.dense", arch.hidden_size, arch.intermediate_size)
        return self._norm(graph.one("Add", [x, y]), f"{prefix}.output.LayerNorm")

    def _pooled(self, x: str, mask: str) -> str:
        """``x`` [texts, tokens, hidden], ``mask`` [texts, tokens, 1]."""
        graph, kind = self._graph, self._arch.pooling
        if kind == "cls":
            return graph.one("Gather", [x, graph.constant(np.array(0, np.int64))], axis=1)
        if kind == "max":
            hidden = graph.one("Mul", [graph.one("Sub", [graph.scalar(1.0), mask]), graph.scalar(_HIDDEN)])
            return graph.one("ReduceMax", [graph.one("Add", [x, hidden]), graph.ints(1)], keepdims=0)
        total = graph.one("ReduceSum", [graph.one("Mul", [x, mask]), graph.ints(1)], keepdims=0)
        return graph.one("Div", [total, graph.one("ReduceSum", [mask, graph.ints(1)], keepdims=0)])

    def _table(self, name: str, rows: int, ids: str) -> str:
        full = f"embeddings.{name}"
        stored = self._stored(full, self._checkpoint.tensor(f"{full}.weight", rows, self._arch.hidden_size))
        return self._widened(self._graph.one("Gather", [stored, ids], axis=0))

    def _dense(self, x: str, name: str, rows: int, columns: int) -> str:
        graph = self._graph
        weight = self._checkpoint.tensor(f"{name}.weight", rows, columns)
        bias = graph.weight(f"{name}.bias", self._checkpoint.tensor(f"{name}.bias", rows))
        return graph.one("Add", [graph.one("MatMul", [x, self._widened(self._stored(name, weight.T))]), bias])

    def _norm(self, x: str, name: str) -> str:
        graph, size = self._graph, self._arch.hidden_size
        gain, bias = (self._checkpoint.tensor(f"{name}.{part}", size) for part in ("weight", "bias"))
        named = [graph.weight(f"{name}.gain", gain), graph.weight(f"{name}.shift", bias)]
        return graph.one("LayerNormalization", [x, *named], axis=-1, epsilon=self._arch.norm_eps)

    def _stored(self, name: str, value: NDArray[Any]) -> str:
        return self._graph.weight(f"{name}.weight", value.astype(np.float16) if self._half else value)

    def _widened(self, value: str) -> str:
        return self._graph.one("Cast", [value], to=_FLOAT) if self._half else value
