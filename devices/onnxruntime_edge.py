"""A decoder over ONNX Runtime with our own operators on the CPU (``kernels/``), with a block pool of our own.

The graph's inputs are described in :mod:`exporters.onnx_edge_builder`. Every batch, whatever its mixture of prompt
chunks and single tokens, is one inference, whose attention writes into the KV cache that it is given.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from devices.base import DecoderOptions, DecoderSpec
from devices.block_pool import BlockPool
from devices.edge_binding import EdgeBinding, Shape, SharedLogits
from devices.edge_kernels import kernels_library
from devices.errors import EngineError
from devices.kv_blocks import KVBlocks
from devices.kv_pool import KVPool
from devices.kv_types import KVType, choose_kv_type
from devices.onnxruntime_profiling import OnnxRuntimeCounters
from devices.onnxruntime_session import engine_errors, open_session
from devices.paged_decoder import PagedDecoder, Part, blocks_to_hold, tokens_to_hold

BLOCK = 32
"""Tokens of a block of the KV cache; the kernels know no other."""
KV_TYPES: tuple[KVType, ...] = ("float16", "int8")
_WIDTH_STEP = 8
"""Block tables are wider by so many blocks at once: a sequence that grows keeps its binding for 256 tokens."""
_KEPT_TOKENS = 16
"""Calls of up to so many tokens, as decoding and verifying drafts make them, keep their bindings; all write to one
buffer."""
_KEPT_BINDINGS = 64
"""Of the shapes used last."""


class OnnxRuntimeEdgeDecoder(PagedDecoder):
    """Implements :class:`devices.base.Decoder` on a CPU that has the instructions which our kernels use.

    ``options.batch_invariant`` changes nothing: the kernels compute every token alike, to the last bit, whatever is
    beside it, and so does ONNX Runtime with matrices that are not quantized. The KV cache is float16, or int8 with a
    scale for each token of a head, or for each sequence one of both (``auto``); the system gives its memory when it is
    written to.
    """

    def __init__(self, spec: DecoderSpec, options: DecoderOptions) -> None:
        """DeviceUnavailable without the kernels or onnxruntime, or with another KV cache; EngineError if the model is
        refused or its KV cache finds no address space."""
        tokens = tokens_to_hold(spec, options)
        first = choose_kv_type("edge:cpu", options.kv_type, KV_TYPES)
        self._session = open_session(spec, options, "edge:cpu", operators=kernels_library())
        _check_cache(self._session, spec)
        most = tokens * _head_bytes(spec.head_dim, first)
        self._storages: dict[KVPool, KVBlocks] = {}
        for kv_type in KV_TYPES if options.kv_type == "auto" else (first,):
            size = _head_bytes(spec.head_dim, kv_type)
            blocks = blocks_to_hold(most // size, options.max_sequences, BLOCK)
            storage = KVBlocks(blocks, BLOCK, spec.num_layers, spec.num_kv_heads, size)
            self._storages[KVPool(BlockPool(blocks, BLOCK), storage, kv_type)] = storage
        self._logits = SharedLogits(_KEPT_TOKENS, spec.vocab_size)
        self._bindings: dict[tuple[KVPool, Shape], EdgeBinding] = {}
        super().__init__(
            "edge:cpu",
            spec,
            options,
            list(self._storages),
            kv_tokens=tokens,
            long_offset=spec.max_context,
            invariant=True,
        )
        if options.profile is not None:
            self.counters = OnnxRuntimeCounters(self._session, spec.model, self._stopwatch)

    # ---- running

    def _compute(self, parts: list[Part], pool: KVPool) -> list[NDArray[np.float32]]:
        longest = max(len(part.blocks) for part in parts)
        shape = Shape(
            tokens=sum(len(part.tokens) for part in parts),
            sequences=len(parts),
            width=-(-longest // _WIDTH_STEP) * _WIDTH_STEP,
            rows=sum(part.rows for part in parts),
        )
        with engine_errors("running a batch"):
            if shape.tokens > _KEPT_TOKENS:  # takes so long that binding anew is nothing
                logits = np.empty((shape.rows, self._vocab_size), np.float32)
                bound = EdgeBinding(self._session, self._storages[pool].values, logits, shape)
            else:
                bound = self._kept(pool, shape)
                logits = self._logits.view(shape.rows)
            bound.write(parts)
            with self._stopwatch:
                self._session.run_with_iobinding(bound.binding)
        results, end = [], 0
        for part in parts:
            results.append(logits[end : end + part.rows])
            end += part.rows
        return results

    def _kept(self, pool: KVPool, shape: Shape) -> EdgeBinding:
        if self._logits.renew():
            self._bindings.clear()
        bound = self._bindings.pop((pool, shape), None)
        if bound is None:
            bound = EdgeBinding(self._session, self._storages[pool].values, self._logits.view(shape.rows), shape)
        self._bindings[pool, shape] = bound  # the last: what was not used for longest is the first
        if len(self._bindings) > _KEPT_BINDINGS:
            del self._bindings[next(iter(self._bindings))]
        return bound

    # ---- the end

    def _release(self) -> None:
        self._bindings.clear()
        self._session = None
        for storage in self._storages.values():
            storage.close()


def _head_bytes(head_dim: int, kv_type: KVType) -> int:
    """Of the keys, or the values, of a head in a block: see :mod:`exporters.onnx_edge_builder`."""
    return BLOCK * (head_dim + 4 if kv_type == "int8" else 2 * head_dim)


def _check_cache(session: Any, spec: DecoderSpec) -> None:
    """EngineError unless the graph's KV cache is as the decoder will make it."""
    wanted = ["tensor(uint8)", spec.num_layers, 2, spec.num_kv_heads, "head_bytes"]
    found = next(([each.type, *each.shape[1:]] for each in session.get_inputs() if each.name == "kv_cache"), None)
    if found != wanted:
        raise EngineError(
            f"{spec.model} has the KV cache {found}, edge:cpu needs {wanted}; export the model again with "
            "--engine onnx-edge, or edge-glm rm and pull it"
        )
