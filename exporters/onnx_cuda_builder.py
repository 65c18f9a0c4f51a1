"""The network as an ONNX graph for ONNX Runtime's CUDA provider: PagedAttention, everything in 16 bits.

Inputs (all on the device but the bounds): ``input_ids`` [tokens] int32, the tokens of all sequences one after another;
``cumulative_sequence_length`` [sequences + 1] int32, where each begins; ``past_seqlens`` [sequences] int32, tokens held
before; ``block_table`` [sequences, blocks of a sequence] int32; ``attention_bounds`` [3] int32 in host memory, the
longest step, and bounds above and below the most tokens a sequence holds after it; ``row_index`` [rows] int32, which
tokens get logits; ``position_ids`` [1, tokens] int64, only for models with a rope switch; ``key_cache.N`` and
``value_cache.N`` [blocks, block size, kv_heads, head_dim]. Outputs: ``logits`` [rows, vocab] float32, and
``key_cache_out.N`` and ``value_cache_out.N``, which must be the caches' own memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from edge_runtime.errors import UnsupportedModel
from exporters.architecture import Architecture, Rope
from exporters.builder import AttentionSpec
from exporters.onnx_graph import MICROSOFT
from exporters.onnx_operators import OnnxOperators, WeightFormat, passes_float16
from exporters.onnx_weights import PackedMatrix, pack, pack_bits
from exporters.weights import QuantizedTensor, dequantize


@dataclass(frozen=True)
class _Matrix:
    """A packed matrix in the graph: the names of its constants, "" where there is none."""

    packed: PackedMatrix
    codes: str
    scale: str
    zero: str


class OnnxCudaBuilder(OnnxOperators[_Matrix]):
    """Emits PagedAttention, MatMulNBits, GatherBlockQuantized and the fused norms (com.microsoft)."""

    levels = (4, 8, 16)

    def __init__(self, architecture: Architecture, weights: WeightFormat, scratch: Path | None = None) -> None:
        """``weights``: fp16 dequantizes what comes quantized; with int8 and int4 quantized matrices are stored as they
        come and float ones in 16 bits. ``scratch``: see OnnxGraph. UnsupportedModel for fp32."""
        if weights == "fp32":
            raise UnsupportedModel("CUDA's PagedAttention computes in 16 bits; export with fp16, int8 or int4 weights")
        dtype = ml_dtypes.bfloat16 if passes_float16(architecture) else np.float16
        super().__init__(architecture, weights, scratch, dtype)
        graph = self._graph
        self._ids = graph.input("input_ids", np.int32, ["tokens"])
        self._begins = graph.input("cumulative_sequence_length", np.int32, ["sequence_ends"])
        self._past = graph.input("past_seqlens", np.int32, ["sequences"])
        self._table = graph.input("block_table", np.int32, ["sequences", "sequence_blocks"])
        self._bounds = graph.input("attention_bounds", np.int32, [3])
        self._row_index = graph.input("row_index", np.int32, ["rows"])
        self._positions = ""
        if architecture.rope_switch is not None:
            self._positions = graph.input("position_ids", np.int64, [1, "tokens"])
        self._with_sums: dict[tuple[str, int, int], str] = {}

    def _embed_packed(self, matrix: _Matrix, table: QuantizedTensor) -> str:
        graph, packed = self._graph, matrix.packed
        if packed.offset_columns:  # a lookup has no block sums
            unpacked = graph.weight("embed.weight", self._stored(dequantize(table)))
            return graph.one("Gather", [unpacked, self._ids], axis=0)
        rows, blocks, blob = packed.codes.shape
        flat = graph.alias("embed.codes.rows", matrix.codes, [rows, blocks * blob])
        return graph.one(
            "GatherBlockQuantized",
            [flat, self._ids, matrix.scale, matrix.zero],
            MICROSOFT,
            gather_axis=0,
            quantize_axis=1,
            block_size=packed.group,
            bits=packed.bits,
        )

    def _packed_product(self, x: str, matrix: _Matrix, bias: str, name: str) -> str:
        graph, packed = self._graph, matrix.packed
        if packed.offset_columns:
            x = self._append_block_sums(x, packed)
        rows, blocks, _ = packed.codes.shape
        y = graph.one(
            "MatMulNBits",
            [x, matrix.codes, matrix.scale, matrix.zero],
            MICROSOFT,
            K=blocks * packed.group,
            N=rows,
            bits=packed.bits,
            block_size=packed.group,
        )
        return graph.one("Add", [y, bias]) if bias else y  # the fast kernel of MatMulNBits has no bias

    def _append_block_sums(self, x: str, packed: PackedMatrix) -> str:
        """(x, of each block its sum times each digit's worth, padding): what a matrix with offset columns takes.

        Once per ``x``. The padding meets zeros, so ``x``'s own first columns do for it.
        """
        key = (x, packed.group, packed.digits)
        if key not in self._with_sums:
            graph = self._graph
            worth = packed.digit_base ** -np.arange(packed.digits)
            blocks = graph.one("Reshape", [x, graph.ints(-1, packed.group)])
            weights = graph.constant(np.tile(worth, (packed.group, 1)).astype(self._dtype))
            sums = graph.one("MatMul", [blocks, weights])
            parts = [x, graph.one("Reshape", [sums, graph.ints(-1, packed.offset_columns)])]
            padding = -packed.offset_columns % packed.group
            if padding:
                parts.append(graph.one("Slice", [x, graph.ints(0), graph.ints(padding), graph.ints(-1)]))
            self._with_sums[key] = graph.one("Concat", parts, axis=-1)
        return self._with_sums[key]

    def _matrix(self, tensor: QuantizedTensor, name: str) -> _Matrix:
        try:
            packed = pack(tensor, digits_together=True)
        except ValueError as error:
            raise UnsupportedModel(f"{name}: {error}; export it with other weights") from error
        graph, zeros = self._graph, packed.zero
        if zeros is None and not _has_fast_kernel(packed):
            middle = np.full(packed.scale.shape, 2 ** (packed.bits - 1), np.uint8)
            zeros = pack_bits(middle, packed.bits)
        zero = "" if zeros is None else graph.weight(f"{name}.zero", zeros)
        codes = graph.weight(f"{name}.codes", packed.codes)
        return _Matrix(packed, codes, graph.weight(f"{name}.scale", self._stored(packed.scale)), zero)

    def attention(self, qkv: str, spec: AttentionSpec) -> str:
        """PagedAttention; it norms heads, rotates, appends to the cache and masks.

        It knows no positions but those in the cache, so a model with a rope switch rotates before it.
        """
        graph, rope = self._graph, spec.layer.rope
        query, key, value = qkv, "", ""
        rotated_here = rope is not None and bool(self._positions)
        if rotated_here:
            if spec.q_norm is not None or spec.k_norm is not None:
                raise UnsupportedModel("a model with both head norms and a rope switch does not run on CUDA")
            sizes = graph.ints(*(heads * spec.head_dim for heads in (spec.num_heads, *[spec.num_kv_heads] * 2)))
            query, key, value = graph.node("Split", [qkv, sizes], 3, axis=-1)
            query = self._rotate(query, rope, spec.num_heads)
            key = self._rotate(key, rope, spec.num_kv_heads)
        caches = [f"{kind}_cache.{spec.index}" for kind in ("key", "value")]
        outputs = [f"{kind}_cache_out.{spec.index}" for kind in ("key", "value")]
        dims: list[int | str] = ["blocks", block_size(spec.head_dim), spec.num_kv_heads, spec.head_dim]
        for name in caches:
            graph.input(name, self._dtype, dims)
        rotary = rope is not None and not rotated_here
        cos, sin = self._rope_tables(rope) if rope is not None and rotary else ("", "")
        norms = [
            "" if weight is None else graph.constant(weight.astype(self._dtype))
            for weight in (spec.q_norm, spec.k_norm)
        ]
        inputs = [query, key, value, *caches, self._begins, self._past, self._table, cos, sin]
        inputs += ["", "", *norms, "", "", self._bounds]
        output = f"attention.{spec.index}"
        attributes = {"qk_norm_epsilon": spec.norm_eps} if spec.q_norm is not None else {}
        graph.node(
            "PagedAttention",
            inputs,
            [output, *outputs],
            MICROSOFT,
            **self._attention_attributes(spec),
            do_rotary=int(rotary),
            rotary_interleaved=int(rope is not None and rope.interleaved),
            **attributes,
        )
        for name in outputs:
            graph.output(name, self._dtype, dims)
        return output

    def _rotate(self, x: str, rope: Rope | None, heads: int) -> str:
        assert rope is not None
        graph = self._graph
        cos, sin = self._rope_tables(rope)
        batch = graph.one("Unsqueeze", [x, graph.ints(0)])
        rotated = graph.one(
            "RotaryEmbedding",
            [batch, self._positions, cos, sin],
            MICROSOFT,
            interleaved=int(rope.interleaved),
            num_heads=heads,
            rotary_embedding_dim=rope.rotary_dim if rope.rotary_dim < self._arch.head_dim else 0,
        )
        return graph.one("Squeeze", [rotated, graph.ints(0)])


def _has_fast_kernel(packed: PackedMatrix) -> bool:
    """Whether MatMulNBits may take its weight-only GEMM (``ep.cuda.fpa_intb_gemm``), which matrices without explicit
    zero points get.

    With 4 bits the plain kernels are ahead of it; where the columns are no multiple of 64 it finds no tactic and fails.
    """
    columns = packed.codes.shape[1] * packed.group
    return packed.bits == 8 and columns % 64 == 0


def block_size(head_dim: int) -> int:
    """Tokens of a cache block: the fewest with which PagedAttention takes its FlashAttention kernel."""
    if head_dim <= 64:
        return 256
    return 128 if head_dim <= 128 else 64
