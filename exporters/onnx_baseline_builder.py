"""The network as most exporters write it: an ONNX graph of standard operators, whole prompts, keys and values joined.

Nothing is fused, packed or shared, so this is what the ladder of ``edge-glm bench`` begins at, and it is read by both
engines. Inputs: ``input_ids`` [tokens] int64; ``position_ids`` [tokens] int64, rows of the rotary tables, of which
there are max_context, and for longrope as many more; ``row_index`` [rows] int64, which tokens get logits; ``mask``
[tokens, seen] float32, and ``mask.W`` for layers with a window of W, added to the scores of the tokens held and of the
new ones; ``past.L.key``/``.value`` [kv_heads, held, head_dim] float32. Outputs: ``logits`` [rows, vocab] float32 and
``present.L.key``/``.value`` [kv_heads, seen, head_dim].
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edge_runtime.errors import UnsupportedModel
from exporters.architecture import Architecture
from exporters.builder import AttentionSpec
from exporters.onnx_operators import WeightFormat
from exporters.onnx_plain_operators import PlainOperators


class OnnxBaselineBuilder(PlainOperators):
    """Weights are fp32, whatever the checkpoint has."""

    def __init__(self, architecture: Architecture, weights: WeightFormat, scratch: Path | None = None) -> None:
        if weights != "fp32":
            raise UnsupportedModel(f"the baseline has fp32 weights, not {weights}")
        super().__init__(architecture, weights, scratch, np.float32, tokens=-1)
        graph = self._graph
        self._ids = graph.input("input_ids", np.int64, ["tokens"])
        self._positions = graph.input("position_ids", np.int64, ["tokens"])
        self._row_index = graph.input("row_index", np.int64, ["rows"])

    def attention(self, qkv: str, spec: AttentionSpec) -> str:
        graph, heads, kv_heads, dim = self._graph, spec.num_heads, spec.num_kv_heads, spec.head_dim
        query, key, value = self._by_heads(qkv, spec)
        keys, values = (self._joined(spec, kind, new) for kind, new in (("key", key), ("value", value)))
        query = graph.one("Reshape", [query, graph.ints(kv_heads, heads // kv_heads, -1, dim)])
        turned = graph.one("Transpose", [graph.one("Unsqueeze", [keys, graph.ints(1)])], perm=[0, 1, 3, 2])
        scores = self.scale(graph.one("MatMul", [query, turned]), spec.scale)
        if spec.softcap is not None:
            scores = self._softcap(scores, spec.softcap, np.float32)
        scores = graph.one("Add", [scores, self._mask(spec.layer.sliding_window)])
        weights = graph.one("Softmax", [scores], axis=-1)
        y = graph.one("MatMul", [weights, graph.one("Unsqueeze", [values, graph.ints(1)])])
        y = graph.one("Reshape", [y, graph.ints(heads, -1, dim)])
        return graph.one("Reshape", [graph.one("Transpose", [y], perm=[1, 0, 2]), graph.ints(-1, heads * dim)])

    def _joined(self, spec: AttentionSpec, kind: str, new: str) -> str:
        heads, dim = spec.num_kv_heads, spec.head_dim
        past = self._graph.input(f"past.{spec.index}.{kind}", np.float32, [heads, "held", dim])
        present = f"present.{spec.index}.{kind}"
        self._graph.node("Concat", [past, new], [present], axis=1)
        self._graph.output(present, np.float32, [heads, self._seen(), dim])
        return present

    def _seen(self) -> str:
        return "seen"
