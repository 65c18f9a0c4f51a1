"""The network as an OpenVINO graph: the stateful form that PagedAttention conversion and the NPU plugin accept.

Inputs: ``input_ids``, ``attention_mask``, ``position_ids`` (batch, tokens) i64 and ``beam_idx`` (batch,) i32; output
``logits`` (batch, tokens, vocab) f32. The KV cache is variables named as optimum-intel names them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from exporters.architecture import Activation, Architecture, Rope
from exporters.builder import AttentionSpec, Levels, Linear
from exporters.openvino_weights import View, WeightFile, compressed_matrix, float_matrix, offset_matrix, ops, ov
from exporters.weights import QuantizedTensor, Tensor, concat_rows, dequantize

opset6 = __import__("openvino.opset6", fromlist=["opset6"])

WeightFormat = Literal["fp32", "fp16", "int8", "int4"]

ROPE_OFFSET = 2**24
"""Longrope: positions of sequences on the long factors are fed with this added; above any context, below i32's end.

The graph takes it off again in integers. It stands in the model's rt_info (``edge_glm/rope_offset``)."""

MASKED = -65504.0
"""Finite, so that a row without any allowed key (padding) gives no NaN; the lowest float16."""


class OpenVinoBuilder:
    """Implements :class:`exporters.builder.Builder` with OpenVINO nodes, (batch, tokens, channels) f32.

    ``weights`` says how matrices that come as floats are stored (int8 and int4: as fp16, they were left alone on
    purpose) and whether quantized ones keep their codes (int8, int4). Of those, the head and the query-key-value
    projection multiply unrounded activations, the others may take the engine's int8 path. The head clearly matters;
    which projection to spare is within the noise of what was measured, so the one with the least arithmetic but o's
    is spared, where no block sums are needed then. ``scratch`` is the folder for the growing
    weight file, by default the system's temporary one; memory holds the tensors of one call.
    """

    levels: ClassVar[Levels] = (4, 8)
    """The CPU plugin makes float32 of a float16 matrix, which takes twice the memory and as long as one of float32."""

    def __init__(self, architecture: Architecture, weights: WeightFormat, scratch: Path | None = None) -> None:
        self._arch = architecture
        self._weights = weights
        self._compress = weights in ("int8", "int4")
        self._half = weights != "fp32"
        self._store = WeightFile(scratch)
        self._ids = self._input("input_ids", [-1, -1], ov.Type.i64)
        self._attention_mask = self._input("attention_mask", [-1, -1], ov.Type.i64)
        self._position_ids = self._input("position_ids", [-1, -1], ov.Type.i64)
        self._beam_idx = self._input("beam_idx", [-1], ov.Type.i32)
        self._table: View | None = None
        self._results: list[Any] = []
        self._sinks: list[Any] = []
        self._sums: dict[tuple[str, int, int], Any] = {}
        self._rotations: dict[Rope, tuple[Any, Any]] = {}
        self._masks: dict[int | None, Any] = {}
        self._on_long, self._positions = self._split_positions()

    @staticmethod
    def _input(name: str, shape: list[int], element_type: Any) -> Any:
        node = ops.parameter(shape, element_type, name)
        node.set_friendly_name(name)  # the PagedAttention conversion looks inputs up by this one
        node.output(0).get_tensor().set_names({name})
        return node

    # ---- the vocabulary

    def embed(self, table: Tensor) -> Any:
        self._table = self._matrix(table, exact=True)
        return ops.gather(self._table(), self._ids, _i64(0))

    def linear(self, x: Any, parts: Sequence[Linear], name: str) -> Any:
        parts = self._in_pair_order(parts, name)
        exact = name.endswith(".qkv")
        products = [self._product(x, tensor, exact) for tensor in concat_rows([weight for weight, _ in parts])]
        y = products[0] if len(products) == 1 else ops.concat(products, -1)
        if any(bias is not None for _, bias in parts):
            biases = [np.zeros(w.shape[0], np.float32) if bias is None else bias for w, bias in parts]
            y = ops.add(y, _f32(np.concatenate(biases).reshape(1, 1, -1)))
        y.set_friendly_name(name)
        return y

    def rms_norm(self, x: Any, weight: NDArray[np.float32], eps: float) -> Any:
        mean = ops.reduce_mean(ops.power(x, _f32(2.0)), _i64([-1]), True)
        inverse = ops.divide(_f32(1.0), ops.sqrt(ops.add(mean, _f32(eps))))
        return ops.multiply(_f32(weight), ops.multiply(x, inverse))

    def add_rms_norm(self, x: Any, y: Any, weight: NDArray[np.float32], eps: float) -> tuple[Any, Any]:
        total = self.add(x, y)
        return total, self.rms_norm(total, weight, eps)

    def add(self, x: Any, y: Any) -> Any:
        return ops.add(x, y)

    def scale(self, x: Any, factor: float) -> Any:
        return ops.multiply(x, _f32(factor))

    def glu(self, gate_up: Any, activation: Activation) -> Any:
        half = gate_up.get_output_partial_shape(0)[2].get_length() // 2
        split = ops.variadic_split(gate_up, _i64(-1), _i64([half, half]))
        gate = split.output(0)
        if activation == "silu":
            gate = ops.swish(gate)
        else:
            gate = ops.gelu(gate, "tanh" if activation == "gelu_tanh" else "erf")
        return ops.multiply(gate, split.output(1))

    def select_rows(self, x: Any) -> Any:
        return x  # the paged decoder puts its Gather before the head itself; a stateful graph returns every token

    def lm_head(self, x: Any, table: Tensor | None, scale: float, softcap: float | None) -> None:
        # exact: int8 activations in this one product would cost 2 % of the top-1 tokens
        view = self._table if table is None else self._matrix(table, exact=True)
        if view is None:
            raise ValueError("a tied head needs the embedding first")
        logits = ops.matmul(x, view(), False, True)
        if scale != 1.0:
            logits = self.scale(logits, scale)
        if softcap is not None:
            logits = _soft_cap(logits, softcap)
        result = ops.result(logits, name="logits")
        result.input_value(0).get_tensor().set_names({"logits"})
        self._results.append(result)

    def attention(self, qkv: Any, spec: AttentionSpec) -> Any:
        heads, kv_heads, dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
        split = ops.variadic_split(qkv, _i64(-1), _i64([heads * dim, kv_heads * dim, kv_heads * dim]))
        rope = spec.layer.rope
        q = self._head_norm(_heads(split.output(0), heads, dim), spec.q_norm, spec)
        k = self._head_norm(_heads(split.output(1), kv_heads, dim), spec.k_norm, spec)
        q, k, v = (_swap_heads(value) for value in (q, k, _heads(split.output(2), kv_heads, dim)))
        if rope is not None:
            q, k = self._rotate(q, rope, dim), self._rotate(k, rope, dim)
        k, v = self._cached(k, spec, "key"), self._cached(v, spec, "value")
        groups = heads // kv_heads
        k, v = _repeat_heads(k, groups, spec), _repeat_heads(v, groups, spec)
        mask = self._mask(spec.layer.sliding_window)
        if spec.softcap is None:
            y = ops.scaled_dot_product_attention(q, k, v, mask, _f32(spec.scale))
        else:  # no engine operator caps scores: written out
            scores = ops.multiply(ops.matmul(q, k, False, True), _f32(spec.scale))
            y = ops.matmul(ops.softmax(ops.add(_soft_cap(scores, spec.softcap), mask), 3), v, False, False)
        return ops.reshape(_swap_heads(y), _i64([0, 0, heads * dim]), True)

    def save(self, folder: Path) -> None:
        inputs = [self._ids, self._attention_mask, self._position_ids, self._beam_idx]
        model = ov.Model(self._results, self._sinks, inputs + self._store.placeholders, self._arch.family)
        model.set_rt_info(self._weights, ["edge_glm", "weights"])
        if self._arch.rope_switch is not None:
            model.set_rt_info(ROPE_OFFSET, ["edge_glm", "rope_offset"])
        self._store.finish(model, folder)

    # ---- linear layers

    def _matrix(self, tensor: Tensor, exact: bool = False) -> View:
        if isinstance(tensor, QuantizedTensor) and self._compress:
            return compressed_matrix(self._store, tensor, exact)
        return float_matrix(self._store, dequantize(tensor), self._half)

    def _product(self, x: Any, tensor: Tensor, exact: bool) -> Any:
        y = ops.matmul(x, self._matrix(tensor, exact)(), False, True)
        if exact or not (isinstance(tensor, QuantizedTensor) and self._compress):
            return y
        offsets = offset_matrix(tensor)
        if offsets is None:
            return y
        rest = compressed_matrix(self._store, offsets, exact=True)()
        return ops.add(y, ops.matmul(self._group_sums(x, tensor.group), rest, False, True))

    def _group_sums(self, x: Any, group: int) -> Any:
        """Sums of ``x`` over each ``group`` channels, (batch, tokens, channels / group); made once for each ``x``."""
        source = x if isinstance(x, ov.Output) else x.output(0)
        key = (source.get_node().get_name(), source.get_index(), group)
        if key not in self._sums:
            groups = source.get_partial_shape()[2].get_length() // group
            self._sums[key] = ops.reduce_sum(ops.reshape(x, _i64([0, 0, groups, group]), True), _i64([-1]), False)
        return self._sums[key]

    # ---- rotary embedding

    def _split_positions(self) -> tuple[Any, Any]:
        """Whether each token is on the long factors, and its position: (batch, tokens), boolean (or None) and i64."""
        if self._arch.rope_switch is None:
            return None, self._position_ids
        on_long = ops.greater_equal(self._position_ids, _i64(ROPE_OFFSET))
        offset = ops.multiply(ops.convert(on_long, "i64"), _i64(ROPE_OFFSET))
        return on_long, ops.subtract(self._position_ids, offset)

    def _in_pair_order(self, parts: Sequence[Linear], name: str) -> list[Linear]:
        """Queries and keys with their channels in the order of :func:`pair_order`; other layers as they are."""
        if not name.endswith(".qkv"):
            return list(parts)
        rope = self._arch.layers[int(name.split(".")[1])].rope
        dim = self._arch.head_dim
        if rope is None or not _needs_reorder(rope, dim):
            return list(parts)
        (q, k, v) = parts
        return [_take_channels(q, pair_order(rope, dim)), _take_channels(k, pair_order(rope, dim)), v]

    def _head_norm(self, x: Any, weight: NDArray[np.float32] | None, spec: AttentionSpec) -> Any:
        if weight is None:
            return x
        rope = spec.layer.rope
        if rope is not None and _needs_reorder(rope, spec.head_dim):
            weight = weight[pair_order(rope, spec.head_dim)]
        return self.rms_norm(x, weight, spec.norm_eps)

    def _rotate(self, x: Any, rope: Rope, dim: int) -> Any:
        """Pairs (i, i + dim/2) of x (batch, heads, tokens, dim) turned: the form that the plugins fuse into one op."""
        cos, sin = self._rotation(rope, dim)
        split = ops.variadic_split(x, _i64(3), _i64([dim // 2, dim // 2]))  # the fusion wants 3, not -1
        turned = ops.concat([ops.multiply(split.output(1), _f32(-1.0)), split.output(0)], -1)
        return ops.add(ops.multiply(x, cos), ops.multiply(turned, sin))

    def _rotation(self, rope: Rope, dim: int) -> tuple[Any, Any]:
        """cos and sin, (batch, 1, tokens, dim) f32; channels that are not rotated have frequency 0."""
        if rope not in self._rotations:
            still = np.zeros((dim - rope.rotary_dim) // 2)
            moving = np.arange(dim // 2) < rope.rotary_dim // 2

            def row(inv_freq: tuple[float, ...]) -> NDArray[np.float32]:
                return np.concatenate([inv_freq, still]).astype(np.float32).reshape(1, 1, -1)

            def factor(scale: float) -> NDArray[np.float32]:
                return np.where(np.tile(moving, 2), scale, 1.0).astype(np.float32).reshape(1, 1, -1)

            frequency, scale = _f32(row(rope.inv_freq)), _f32(factor(rope.scale))
            if rope.long_inv_freq is not None:
                on_long = ops.unsqueeze(self._on_long, _i64(2))
                frequency = ops.select(on_long, _f32(row(rope.long_inv_freq)), frequency)
                scale = ops.select(on_long, _f32(factor(rope.long_scale)), scale)
            position = ops.unsqueeze(ops.convert(self._positions, "f32"), _i64(2))
            angle = ops.multiply(position, frequency)
            angle = ops.concat([angle, angle], -1)
            cos, sin = ops.cos(angle), ops.sin(angle)
            if (rope.scale, rope.long_scale) != (1.0, 1.0):
                cos, sin = ops.multiply(cos, scale), ops.multiply(sin, scale)
            self._rotations[rope] = ops.unsqueeze(cos, _i64(1)), ops.unsqueeze(sin, _i64(1))
        return self._rotations[rope]

    # ---- cache and mask

    def _cached(self, value: Any, spec: AttentionSpec, kind: str) -> Any:
        """All tokens so far: the variable's content, reordered by beam_idx, and ``value`` behind it."""
        name = f"past_key_values.{spec.index}.{kind}present.{spec.index}.{kind}"
        shape = [-1, spec.num_kv_heads, -1, spec.head_dim]
        batch = ops.gather(ops.shape_of(self._ids, "i64"), _i64([0]), _i64(0))
        rest = [_i64([spec.num_kv_heads]), _i64([0]), _i64([spec.head_dim])]
        empty = ops.broadcast(_f32(0.0), ops.concat([batch, *rest], 0))
        past = ops.gather(opset6.read_value(empty, name, ov.Type.f32, ov.PartialShape(shape)), self._beam_idx, _i64(0))
        both = ops.concat([past, value], 2)
        self._sinks.append(opset6.assign(both, name))
        return both

    def _mask(self, window: int | None) -> Any:
        """Additive mask (batch, 1, tokens, keys): a key counts if it is no padding, not newer, and in the window.

        Distances are between positions, not columns, so that padding on either side changes nothing.
        """
        if window not in self._masks:
            keys = ops.subtract(ops.cumsum(self._attention_mask, _i64(1)), _i64(1))
            keys = ops.unsqueeze(keys, _i64([1, 2]))
            queries = ops.unsqueeze(self._positions, _i64([1, 3]))
            seen = ops.not_equal(ops.unsqueeze(self._attention_mask, _i64([1, 2])), _i64(0))
            allowed = ops.logical_and(seen, ops.less_equal(keys, queries))
            if window is not None:
                near = ops.greater(keys, ops.subtract(queries, _i64(window)))
                allowed = ops.logical_and(allowed, near)
            self._masks[window] = ops.select(allowed, _f32(0.0), _f32(MASKED))
        return self._masks[window]


# ---- helpers


def pair_order(rope: Rope, head_dim: int) -> NDArray[np.intp]:
    """Channels of a head such that rotated pairs, then unrotated channels, lie head_dim/2 apart.

    Scores do not change when queries and keys are reordered alike, and one fused rotation serves every kind.
    """
    half, still = rope.rotary_dim // 2, np.arange(rope.rotary_dim, head_dim)
    pairs = np.arange(rope.rotary_dim)
    first, second = (pairs[0::2], pairs[1::2]) if rope.interleaved else (pairs[:half], pairs[half:])
    middle = len(still) // 2
    return np.concatenate([first, still[:middle], second, still[middle:]])


def _needs_reorder(rope: Rope, head_dim: int) -> bool:
    return rope.interleaved or rope.rotary_dim != head_dim


def _take_channels(linear: Linear, order: NDArray[np.intp]) -> Linear:
    weight, bias = linear
    heads = weight.shape[0] // len(order)
    rows = (np.arange(heads)[:, None] * len(order) + order[None, :]).reshape(-1)
    taken = weight.take_rows(rows) if isinstance(weight, QuantizedTensor) else weight[rows]
    return taken, None if bias is None else bias[rows]


def _heads(x: Any, heads: int, dim: int) -> Any:
    return ops.reshape(x, _i64([0, 0, heads, dim]), True)


def _swap_heads(x: Any) -> Any:
    return ops.transpose(x, _i64([0, 2, 1, 3]))


def _repeat_heads(x: Any, groups: int, spec: AttentionSpec) -> Any:
    """(batch, kv_heads, tokens, dim) → heads: the pattern that SDPA fusion knows as grouped-query attention."""
    if groups == 1:
        return x
    ones = ops.broadcast(ops.unsqueeze(x, _i64(2)), _i64([1, 1, groups, 1, 1]), broadcast_spec="BIDIRECTIONAL")
    return ops.reshape(ones, _i64([0, spec.num_heads, -1, spec.head_dim]), True)


def _soft_cap(x: Any, cap: float) -> Any:
    return ops.multiply(ops.tanh(ops.divide(x, _f32(cap))), _f32(cap))


def _i64(value: int | Sequence[int]) -> Any:
    return ops.constant(np.array(value, np.int64))


def _f32(value: float | NDArray[np.float32]) -> Any:
    return ops.constant(np.asarray(value, np.float32))
