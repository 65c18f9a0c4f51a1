"""The network as an ONNX graph for the CPU whose heavy operators are our own (``kernels/``).

Inputs: ``input_ids`` [tokens] int64, the tokens of all sequences one after another; ``positions`` [tokens] int64, each
token's row of the rotary tables; ``begins`` [sequences + 1] int32, where each sequence begins; ``past`` [sequences]
int32, tokens held before; ``block_table`` [sequences, blocks of a sequence] int32; ``row_index`` [rows] int64, which
tokens get logits; ``kv_cache`` [blocks, layers, 2, kv_heads, bytes] uint8, keys and then values of a layer. Keys of a
block are [head_dim][KV_BLOCK], values [KV_BLOCK][head_dim]: float16, or int8 followed by a float32 for each token by
which its codes are multiplied; the number of bytes tells which. Attention writes new ones into this very memory, though
it is only an input. Output: ``logits`` [rows, vocab] float32.

Operators of the domain ``edge_glm``, version 1; activations are float32:

- ``QuantizedMatMul(x [tokens, K], weight [bytes] uint8, bias [N]?, norm [K]?, addend [tokens, N]?) → [tokens, N]``,
  attributes ``K``, ``N``, ``bits``, ``block``, ``offsets`` (see exporters/edge_weights.py), ``activation_bits``: 8 or
  16, to which ``x`` is rounded, or 32, with float16 weights, where it is not, ``epsilon``, and ``gate``: −1 (none) or
  as GatedUnit's, whose ``gate_up [tokens, 2 · K]`` then comes for ``x``. With ``norm`` it multiplies the
  root-mean-square norm of ``x``; ``addend`` is added to the product.
- ``QuantizedGather(ids [tokens] int64, weight [bytes] uint8) → [tokens, K]``, attributes ``K``, ``N``, ``bits``,
  ``block``, ``offsets``: rows of such a matrix.
- ``PagedAttention(qkv, kv_cache, begins, past, block_table, positions, cos?, sin?, q_norm?, k_norm?)``
  ``→ [tokens, heads · head_dim]``, attributes ``layer``, ``num_heads``, ``kv_num_heads``, ``head_dim``,
  ``rotary_interleaved``, ``window`` (0: none), ``scale``, ``softcap`` (0: none), ``epsilon``: it norms heads, rotates
  them, appends keys and values to the cache and attends causally.
- ``GatedUnit(gate_up [tokens, 2 · I]) → [tokens, I]``, attribute ``activation`` (0 silu, 1 gelu by tanh, 2 gelu).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import UnsupportedModel
from exporters.architecture import Activation, Architecture
from exporters.builder import AttentionSpec
from exporters.edge_fusion import fuse
from exporters.edge_weights import HALF_COLUMNS, PackedMatrix, pack, pack_half
from exporters.onnx_graph import EDGE
from exporters.onnx_operators import OnnxOperators, WeightFormat
from exporters.weights import QuantizedTensor

KV_BLOCK = 32
"""Tokens of a block of the cache."""
_WIDE_INPUT = ("head", ".qkv.")
"""In the names of products of 4-bit matrices that always meet activations of 16 bits, as those of 8-bit matrices do."""
_ACTIVATIONS: dict[Activation, int] = {"silu": 0, "gelu_tanh": 1, "gelu": 2}


@dataclass(frozen=True)
class _Matrix:
    """A packed matrix in the graph: the name of its bytes, and the attributes that tell what they are."""

    data: str
    bits: int
    form: dict[str, int]


class OnnxEdgeBuilder(OnnxOperators[_Matrix]):
    """Emits QuantizedMatMul, QuantizedGather, PagedAttention and GatedUnit (edge_glm) and com.microsoft's norms."""

    levels = (4, 8, 16)
    activation_bits: ClassVar[int] = 8
    """Of what other 4-bit matrices meet."""

    def __init__(self, architecture: Architecture, weights: WeightFormat, scratch: Path | None = None) -> None:
        """``weights``: how matrices are stored. fp32 and fp16 also dequantize what comes quantized; with int8 and
        int4 quantized matrices are stored as they come and float ones as fp32. ``scratch``: see OnnxGraph."""
        super().__init__(architecture, weights, scratch, np.float32)
        graph = self._graph
        self._ids = graph.input("input_ids", np.int64, ["tokens"])
        self._positions = graph.input("positions", np.int64, ["tokens"])
        self._begins = graph.input("begins", np.int32, ["sequence_ends"])
        self._past = graph.input("past", np.int32, ["sequences"])
        self._table = graph.input("block_table", np.int32, ["sequences", "sequence_blocks"])
        self._row_index = graph.input("row_index", np.int64, ["rows"])
        cache: list[int | str] = ["blocks", architecture.num_layers, 2, architecture.num_kv_heads, "head_bytes"]
        self._cache = graph.input("kv_cache", np.uint8, cache)

    def _matrix(self, tensor: QuantizedTensor, name: str) -> _Matrix:
        try:
            packed = pack(tensor)
        except ValueError as error:
            raise UnsupportedModel(f"{name}: {error}; export it with other weights") from error
        return _Matrix(self._graph.weight(f"{name}.packed", packed.data), packed.bits, _form(packed))

    def _embed_packed(self, matrix: _Matrix, table: QuantizedTensor) -> str:
        return self._graph.one("QuantizedGather", [self._ids, matrix.data], EDGE, **matrix.form)

    def _half_product(self, x: str, weight: NDArray[np.float16], bias: str, name: str) -> str:
        if weight.shape[1] % HALF_COLUMNS:
            return super()._half_product(x, weight, bias, name)
        packed = pack_half(weight)
        matrix = _Matrix(self._graph.weight(f"{name}.packed", packed.data), packed.bits, _form(packed))
        return self._packed_product(x, matrix, bias, name)

    def _packed_product(self, x: str, matrix: _Matrix, bias: str, name: str) -> str:
        wide = matrix.bits == 8 or any(part in name for part in _WIDE_INPUT)
        bits = 32 if matrix.bits == 16 else 16 if wide else self.activation_bits
        return self._graph.one("QuantizedMatMul", [x, matrix.data, bias], EDGE, **matrix.form, activation_bits=bits)

    def attention(self, qkv: str, spec: AttentionSpec) -> str:
        graph, rope = self._graph, spec.layer.rope
        cos, sin = ("", "") if rope is None else self._rope_tables(rope)
        norms = ["" if weight is None else graph.constant(weight) for weight in (spec.q_norm, spec.k_norm)]
        return graph.one(
            "PagedAttention",
            [qkv, self._cache, self._begins, self._past, self._table, self._positions, cos, sin, *norms],
            EDGE,
            layer=spec.index,
            num_heads=spec.num_heads,
            kv_num_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            rotary_interleaved=int(rope is not None and rope.interleaved),
            window=spec.layer.sliding_window or 0,
            scale=float(spec.scale),
            softcap=float(spec.softcap or 0),
            epsilon=float(spec.norm_eps),
        )

    def glu(self, gate_up: str, activation: Activation) -> str:
        return self._graph.one("GatedUnit", [gate_up], EDGE, activation=_ACTIVATIONS[activation])

    def save(self, folder: Path) -> None:
        self._graph.rewrite(fuse)
        super().save(folder)


class PreciseOnnxEdgeBuilder(OnnxEdgeBuilder):
    """With activations of 16 bits before every matrix."""

    activation_bits = 16


def _form(packed: PackedMatrix) -> dict[str, int]:
    return {
        "K": packed.columns,
        "N": packed.rows,
        "bits": packed.bits,
        "block": packed.block,
        "offsets": int(packed.offsets),
    }
