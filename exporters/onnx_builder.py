"""The network as an ONNX graph of ONNX Runtime's fused operators.

Inputs: ``input_ids`` [batch, sequence] int64, right-padded; ``seqlens_k`` [batch] int32, tokens held after the step
less one; ``query_seqlens`` [batch] int32, tokens of the step that are not padding; ``total_sequence_length`` int32,
the largest number of tokens held; ``row_index`` [rows] int64, which rows of the flattened tokens get logits;
``position_ids`` [batch, sequence] int64, only for models with a rope switch (see :meth:`OnnxBuilder.attention`);
``past_key_values.N.key``/``.value`` [batch, kv_heads, capacity, head_dim]. Outputs: ``logits`` [rows, vocab] float32
and ``present.N.key``/``.value``, which must share the past's memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import UnsupportedModel
from exporters.architecture import Architecture
from exporters.builder import AttentionSpec
from exporters.onnx_graph import MICROSOFT
from exporters.onnx_operators import OnnxOperators, WeightFormat
from exporters.onnx_weights import PackedMatrix, pack
from exporters.weights import QuantizedTensor

_FLOAT_INPUT = ("head", ".qkv.")
"""In the names of products whose 4-bit matrix meets float activations. Of all layers' these pay best: a third of the
remaining loss (SmolLM2 against fp32: KL 0.0019 → 0.0012) for no measurable time at one sequence."""
_TINY = 1e-30
"""Keeps a block of zeros from dividing by zero; far below any activation."""


@dataclass(frozen=True)
class _Matrix:
    """A packed matrix in the graph: the names of its constants, "" where there is none."""

    packed: PackedMatrix
    codes: str
    scale: str
    zero: str


class OnnxBuilder(OnnxOperators[_Matrix]):
    """Emits GroupQueryAttention, MatMulNBits, GatherBlockQuantized and the fused norms (com.microsoft)."""

    def __init__(self, architecture: Architecture, weights: WeightFormat, scratch: Path | None = None) -> None:
        """``weights``: how matrices are stored. fp32 and fp16 also dequantize what comes quantized; with int8 and
        int4 quantized matrices are stored as they come and float ones as fp32. ``scratch``: see OnnxGraph."""
        super().__init__(architecture, weights, scratch, np.float32)
        graph = self._graph
        self._ids = graph.input("input_ids", np.int64, ["batch", "sequence"])
        self._seqlens = graph.input("seqlens_k", np.int32, ["batch"])
        self._query_seqlens = graph.input("query_seqlens", np.int32, ["batch"])
        self._total = graph.input("total_sequence_length", np.int32, [])
        self._row_index = graph.input("row_index", np.int64, ["rows"])
        switch = architecture.rope_switch is not None
        self._positions = graph.input("position_ids", np.int64, ["batch", "sequence"]) if switch else ""
        self._with_sums: dict[tuple[str, int, int], str] = {}
        self._rows_selected = False

    def _embed_packed(self, matrix: _Matrix, table: QuantizedTensor) -> str:
        graph, packed = self._graph, matrix.packed
        rows, all_blocks, blob = packed.codes.shape
        flat_columns = all_blocks * packed.group
        flat = graph.alias("embed.codes.rows", matrix.codes, [rows, all_blocks * blob])
        x = graph.one(
            "GatherBlockQuantized",
            [flat, self._ids, matrix.scale, matrix.zero],
            MICROSOFT,
            gather_axis=0,
            quantize_axis=1,
            block_size=packed.group,
            bits=packed.bits,
        )
        if not packed.offset_columns:
            return x
        # The columns after the matrix are the constants of its blocks: put each back on its block.
        hidden, blocks = self._arch.hidden_size, packed.columns // packed.group
        sizes = [hidden] + [blocks] * packed.digits + [flat_columns - hidden - packed.offset_columns]
        main, *digits = graph.node("Split", [x, graph.ints(*sizes)], len(sizes), axis=-1)[: 1 + packed.digits]
        main = graph.one("Reshape", [main, graph.ints(0, 0, blocks, packed.group)])
        for power, digit in enumerate(digits):
            worth = digit if power == 0 else self.scale(digit, packed.digit_base**-power)
            main = graph.one("Add", [main, graph.one("Unsqueeze", [worth, graph.ints(-1)])])
        return graph.one("Reshape", [main, graph.ints(0, 0, hidden)])

    def _packed_product(self, x: str, matrix: _Matrix, bias: str, name: str) -> str:
        """With int8 activations, one scale per block, but for some matrices of 4 bits. (With 8 bits and float
        activations ONNX Runtime would dequantize the matrix at every call.)"""
        packed = matrix.packed
        float_input = packed.bits == 4 and any(part in name for part in _FLOAT_INPUT)
        if packed.offset_columns:
            x = self._append_block_sums(x, packed)
        return self._graph.one(
            "MatMulNBits",
            [x, matrix.codes, matrix.scale, matrix.zero, "", bias],
            MICROSOFT,
            K=packed.columns + packed.offset_columns,
            N=packed.codes.shape[0],
            bits=packed.bits,
            block_size=packed.group,
            accuracy_level=1 if float_input else 4,
        )

    def _append_block_sums(self, x: str, packed: PackedMatrix) -> str:
        """(x, sums of x over each block, sums / base): what a matrix with offset columns takes. Once per ``x``."""
        key = (x, packed.group, packed.digits)
        if key not in self._with_sums:
            graph = self._graph
            leading = (0,) if self._rows_selected else (0, 0)
            blocks = graph.one("Reshape", [x, graph.ints(*leading, packed.columns // packed.group, packed.group)])
            sums = [graph.one("ReduceSum", [blocks, graph.ints(-1)], keepdims=0)]
            sums += [self.scale(sums[0], packed.digit_base**-power) for power in range(1, packed.digits)]
            self._with_sums[key] = graph.one("Concat", [x, *sums], axis=-1)
        return self._with_sums[key]

    def _matrix(self, tensor: QuantizedTensor, name: str) -> _Matrix:
        try:
            packed = pack(tensor)
        except ValueError as error:
            raise UnsupportedModel(f"{name}: {error}; export it with other weights") from error
        graph = self._graph
        zero = "" if packed.zero is None else graph.weight(f"{name}.zero", packed.zero)
        codes = graph.weight(f"{name}.codes", packed.codes)
        return _Matrix(packed, codes, graph.weight(f"{name}.scale", packed.scale), zero)

    def attention(self, qkv: str, spec: AttentionSpec) -> str:
        """GroupQueryAttention; it rotates, appends to the cache and masks.

        The CPU kernel has no head norms, so those are operators of their own before it.
        """
        graph, rope = self._graph, spec.layer.rope
        query, key, value = qkv, "", ""
        if spec.q_norm is not None or spec.k_norm is not None:
            sizes = graph.ints(*(heads * spec.head_dim for heads in (spec.num_heads, *[spec.num_kv_heads] * 2)))
            query, key, value = graph.node("Split", [qkv, sizes], 3, axis=-1)
            query = self._head_norm(query, spec.q_norm, spec)
            key = self._head_norm(key, spec.k_norm, spec)
        cache = [self._cache_input(spec, kind) for kind in ("key", "value")]
        present = [f"present.{spec.index}.{kind}" for kind in ("key", "value")]
        cos, sin = self._rope_tables(rope) if rope is not None else ("", "")
        positions = self._positions if rope is not None else ""
        inputs = [query, key, value, *cache, self._seqlens, self._total, cos, sin, positions]
        inputs += [""] * 6 + [self._query_seqlens]
        output = f"attention.{spec.index}"
        graph.node(
            "GroupQueryAttention",
            inputs,
            [output, *present],
            MICROSOFT,
            **self._attention_attributes(spec),
            do_rotary=int(rope is not None),
            rotary_interleaved=int(rope is not None and rope.interleaved),
        )
        for name in present:
            graph.output(name, np.float32, self._cache_dims(spec))
        return output

    def _head_norm(self, x: str, weight: NDArray[np.float32] | None, spec: AttentionSpec) -> str:
        if weight is None:
            return x
        graph = self._graph
        heads = graph.one("Reshape", [x, graph.ints(0, 0, -1, spec.head_dim)])
        return graph.one("Reshape", [self.rms_norm(heads, weight, spec.norm_eps), graph.ints(0, 0, -1)])

    def _cache_input(self, spec: AttentionSpec, kind: str) -> str:
        return self._graph.input(f"past_key_values.{spec.index}.{kind}", np.float32, self._cache_dims(spec))

    def _cache_dims(self, spec: AttentionSpec) -> list[int | str]:
        return ["batch", spec.num_kv_heads, "capacity", spec.head_dim]

    def select_rows(self, x: str) -> str:
        self._rows_selected = True
        return super().select_rows(self._graph.one("Reshape", [x, self._graph.ints(-1, self._arch.hidden_size)]))

    def _packed_head(self, x: str, matrix: _Matrix) -> str:
        """Logits without the error of int8 activations, which turns more first choices than any layer's.

        An 8-bit matrix sees each row twice: as int8 holds it exactly, and what that leaves over, whose own int8
        error is 254 times smaller. Both go through one product, so the matrix is read once.
        """
        graph, packed = self._graph, matrix.packed
        if packed.bits == 4:
            return super()._packed_head(x, matrix)
        blocks = graph.one("Reshape", [x, graph.ints(-1, packed.columns // packed.group, packed.group)])
        largest = graph.one("ReduceMax", [graph.one("Abs", [blocks]), graph.ints(-1)], keepdims=1)
        step = graph.one("Max", [self.scale(largest, 1 / 127), graph.scalar(_TINY)])
        high = graph.one("Mul", [graph.one("Round", [graph.one("Div", [blocks, step])]), step])
        low = graph.one("Sub", [blocks, high])
        both = graph.one("Concat", [high, low], axis=0)
        both = graph.one("Reshape", [both, graph.ints(-1, packed.columns)])
        y = super()._packed_head(both, matrix)
        return graph.one("Add", graph.node("Split", [y], 2, axis=0, num_outputs=2))
