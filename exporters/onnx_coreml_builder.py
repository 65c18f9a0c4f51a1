"""The network as ONNX graphs of standard operators with static shapes, which is what CoreML takes.

Two graphs share one weight file: ``model.onnx`` reads :data:`STEP` tokens of a prompt, ``decode.onnx`` one token.
Inputs of a graph for N tokens, whose caches hold C: ``input_ids`` [N] int64; ``position_ids`` [N] int64, rows of the
rotary tables, of which there are C, and for longrope C more; ``row_index`` [1] int64, which token gets logits;
``mask`` [N, C + N], and ``mask.W`` for layers with a window of W, added to the scores of the C cached tokens and of the
new ones; ``past.L.key``/``.value`` [kv_heads, C, head_dim]. Outputs: ``logits`` [1, vocab] float32, and
``new.L.key``/``.value`` [kv_heads, N, head_dim], for the caller to put behind what its caches hold.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from edge_runtime.disk import why
from edge_runtime.errors import StorageError, UnsupportedModel
from exporters.architecture import Activation, Architecture
from exporters.builder import AttentionSpec, Levels, Linear
from exporters.onnx_graph import MODEL_FILE
from exporters.onnx_operators import WeightFormat, passes_float16
from exporters.onnx_plain_operators import FLOAT, PlainOperators
from exporters.weights import Tensor, dequantize

STEP = 64
"""Tokens of a prompt that are read at once; fewer are filled up."""
CONTEXT = 2048
"""Tokens that the caches hold, unless the model was made for fewer: every step attends over all of them."""
LARGEST = 16384
"""No longer dimension may an operator's input have (onnxruntime/core/providers/coreml/builders/helper.cc). The rows of
a larger vocabulary's embedding are found on the CPU."""
OPSET = 20
"""The provider takes no operator of a later version (base_op_builder.h in the same place)."""
DECODE_FILE = "decode.onnx"


class _StepGraph(PlainOperators):
    """One graph, for ``tokens`` tokens at once."""

    def __init__(self, architecture: Architecture, weights: WeightFormat, scratch: Path | None, tokens: int) -> None:
        half = weights == "fp16" and not passes_float16(architecture)
        super().__init__(architecture, weights, scratch, np.float16 if half else np.float32, tokens, OPSET)
        graph = self._graph
        self._capacity = min(architecture.max_context, CONTEXT)
        self._ids = graph.input("input_ids", np.int64, [tokens])
        self._positions = graph.input("position_ids", np.int64, [tokens])
        self._row_index = graph.input("row_index", np.int64, [1])
        self._apart: dict[str, str] = {}  # the second matrix's output by the first's

    def _positions_held(self) -> int:
        return self._capacity

    def _metadata(self) -> dict[str, str]:
        """With a key for CoreML's compiled models, which are kept by the file's path otherwise."""
        return {**super()._metadata(), "COREML_CACHE_KEY": self._graph.digest()}

    # --- head ---------------------------------------------------------------------------------------------------------

    def lm_head(self, x: str, table: Tensor | None, scale: float, softcap: float | None) -> None:
        """In blocks of rows, since no operator takes a longer dimension."""
        graph, vocabulary = self._graph, self._arch.vocab_size
        rows = self._embedding if table is None else graph.weight("head.weight", self._stored(dequantize(table)))
        if not isinstance(rows, str):
            raise ValueError("a tied head needs embed() first")
        blocks = []
        for start in range(0, vocabulary, LARGEST):
            stop = min(start + LARGEST, vocabulary)
            block = rows if vocabulary <= LARGEST else graph.rows(f"head.{start}", rows, start, stop)
            y = graph.one("Gemm", [x, self._widened(block)], transB=1)
            y = y if self._dtype == np.float32 else graph.one("Cast", [y], to=FLOAT)
            y = y if scale == 1.0 else self._scale(y, scale, np.float32)
            blocks.append(y if softcap is None else self._softcap(y, softcap, np.float32))
        if len(blocks) == 1:
            graph.node("Identity", blocks, ["logits"])
        else:
            graph.node("Concat", blocks, ["logits"], axis=-1)
        graph.output("logits", np.float32, [1, vocabulary])

    # --- a joined gate is apart where it would be too long ------------------------------------------------------------

    def linear(self, x: str, parts: Sequence[Linear], name: str) -> str:
        if len(parts) != 2 or sum(weight.shape[0] for weight, _ in parts) <= LARGEST:
            return super().linear(x, parts, name)
        gate = super().linear(x, parts[:1], f"{name}.gate")
        self._apart[gate] = super().linear(x, parts[1:], f"{name}.up")
        return gate

    def _halves(self, gate_up: str) -> tuple[str, str]:
        up = self._apart.pop(gate_up, None)
        return super()._halves(gate_up) if up is None else (gate_up, up)

    # --- attention ----------------------------------------------------------------------------------------------------

    def attention(self, qkv: str, spec: AttentionSpec) -> str:
        """Cached and new keys side by side; the mask says which of them a token sees."""
        graph, count, dim = self._graph, self._tokens, spec.head_dim
        heads, kv_heads = spec.num_heads, spec.num_kv_heads
        group, seen = heads // kv_heads, self._capacity + count
        query, key, value = self._by_heads(qkv, spec)
        keys, values = (self._cached(spec, kind, new) for kind, new in (("key", key), ("value", value)))

        query = self.scale(graph.one("Reshape", [query, graph.ints(kv_heads, group * count, dim)]), spec.scale)
        scores = graph.one("MatMul", [query, graph.one("Transpose", [keys], perm=[0, 2, 1])])
        if spec.softcap is not None:
            scores = self._softcap(scores, spec.softcap, self._dtype)
        scores = graph.one("Reshape", [scores, graph.ints(kv_heads, group, count, seen)])
        scores = graph.one("Add", [scores, self._mask(spec.layer.sliding_window)])
        weights = graph.one("Reshape", [graph.one("Softmax", [scores], axis=-1), graph.ints(kv_heads, -1, seen)])
        y = graph.one("Reshape", [graph.one("MatMul", [weights, values]), graph.ints(heads, count, dim)])
        return graph.one("Reshape", [graph.one("Transpose", [y], perm=[1, 0, 2]), graph.ints(count, heads * dim)])

    def _cached(self, spec: AttentionSpec, kind: str, new: str) -> str:
        dims = [spec.num_kv_heads, self._capacity, spec.head_dim]
        past = self._graph.input(f"past.{spec.index}.{kind}", self._dtype, dims)
        name = f"new.{spec.index}.{kind}"
        self._graph.node("Identity", [new], [name])
        self._graph.output(name, self._dtype, [spec.num_kv_heads, self._tokens, spec.head_dim])
        return self._graph.one("Concat", [past, new], axis=1)

    def _seen(self) -> int:
        return self._capacity + self._tokens


Both = tuple[str, str]
"""A value of the graph for prompts and of that for one token."""


class OnnxCoreMLBuilder:
    """Implements :class:`exporters.builder.Builder` on both graphs at once. UnsupportedModel for quantized weights."""

    levels: ClassVar[Levels] = (16,)

    def __init__(self, architecture: Architecture, weights: WeightFormat, scratch: Path | None = None) -> None:
        if weights not in ("fp16", "fp32"):
            raise UnsupportedModel(f"CoreML takes weights as fp16 or fp32, not {weights}; choose --weights fp16")
        self._scratch = scratch
        self._graphs = tuple(_StepGraph(architecture, weights, scratch, tokens) for tokens in (STEP, 1))

    def embed(self, table: Tensor) -> Both:
        return self._value("embed", table)

    def linear(self, x: Both, parts: Sequence[Linear], name: str) -> Both:
        return self._value("linear", x, parts, name)

    def rms_norm(self, x: Both, weight: NDArray[np.float32], eps: float) -> Both:
        return self._value("rms_norm", x, weight, eps)

    def add_rms_norm(self, x: Both, y: Both, weight: NDArray[np.float32], eps: float) -> tuple[Both, Both]:
        (a, b), (c, d) = self._both("add_rms_norm", x, y, weight, eps)
        return (a, c), (b, d)

    def add(self, x: Both, y: Both) -> Both:
        return self._value("add", x, y)

    def scale(self, x: Both, factor: float) -> Both:
        return self._value("scale", x, factor)

    def attention(self, qkv: Both, spec: AttentionSpec) -> Both:
        return self._value("attention", qkv, spec)

    def glu(self, gate_up: Both, activation: Activation) -> Both:
        return self._value("glu", gate_up, activation)

    def select_rows(self, x: Both) -> Both:
        return self._value("select_rows", x)

    def lm_head(self, x: Both, table: Tensor | None, scale: float, softcap: float | None) -> None:
        self._both("lm_head", x, table, scale, softcap)

    def save(self, folder: Path) -> None:
        """Write both graphs and the one weight file. StorageError if ``folder`` cannot be written."""
        prompts, token = self._graphs
        prompts.save(folder)
        with tempfile.TemporaryDirectory(dir=self._scratch) as other:
            token.save(Path(other))
            try:
                # written in one order, so that both graphs find their weights at the same places
                shutil.move(Path(other) / MODEL_FILE, folder / DECODE_FILE)
            except OSError as error:
                raise StorageError(f"cannot write {folder / DECODE_FILE}: {why(error)}") from error

    def _value(self, name: str, *arguments: Any) -> Both:
        prompts, token = self._both(name, *arguments)
        return prompts, token

    def _both(self, name: str, *arguments: Any) -> tuple[Any, ...]:
        """The call on each graph; of values each its own."""
        return tuple(
            getattr(graph, name)(*(_own(argument, index) for argument in arguments))
            for index, graph in enumerate(self._graphs)
        )


def _own(argument: Any, index: int) -> Any:
    is_value = isinstance(argument, tuple) and len(argument) == 2 and all(isinstance(name, str) for name in argument)
    return argument[index] if is_value else argument
