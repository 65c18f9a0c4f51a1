"""A decoder over OpenVINO's PagedAttention, with a block pool of our own.

Every batch, whatever its mixture of prompt chunks and single tokens, is one inference. Forking and cropping are
block-table work (:mod:`devices.block_pool`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from devices.base import DecoderLimits, DecoderOptions, DecoderSpec, Snapshot, Step
from devices.block_pool import BlockPool, BlockTable
from devices.errors import EngineError
from devices.file_pages import release_file_pages
from devices.openvino_decoder import CompiledDecoder
from devices.openvino_graph import (
    ROWS,
    compile_model,
    engine_errors,
    gather_rows,
    new_core,
    precision_defaults,
    read_model,
    rope_offset,
    to_paged_attention,
)
from devices.paged_sequence import PagedSequence
from devices.steps import check_batch, check_follows, check_rope_switch

_STORAGE = {"u8": np.uint8, "i8": np.int8, "f16": np.float16, "bf16": np.uint16, "f32": np.float32}
"""Element type of a cache → the numpy type of equal width that holds it."""


class _Part(NamedTuple):
    """A sequence's part in an inference."""

    tokens: NDArray[np.int64]
    past: int
    """Tokens held before."""
    position: int
    """Of the first token, for the rotary tables."""
    blocks: list[int]
    rows: int


class OpenVinoDecoder(CompiledDecoder[PagedSequence]):
    """Implements :class:`devices.base.Decoder` on OpenVINO's ``device`` ("CPU", "GPU").

    The KV cache is allocated once, for ``options.kv_tokens`` rounded up to whole blocks; the operating system
    commits its pages when they are first written. Precisions are those of
    :func:`devices.openvino_graph.precision_defaults` unless ``options.properties`` says otherwise.

    EngineError when OpenVINO cannot open ``spec.model``.
    """

    def __init__(self, spec: DecoderSpec, options: DecoderOptions, device: str = "CPU") -> None:
        ov, core = new_core()
        model = read_model(core, spec.model)
        self._ov = ov
        self._vocab_size = spec.vocab_size
        self._weights: Path | None = spec.model.parent
        self._rope_offset = rope_offset(model, spec)
        defaults = precision_defaults(model)
        if options.batch_invariant:  # 8-bit keys share a scale over a block, which a draft would widen
            defaults.setdefault("KV_CACHE_PRECISION", "f16")
        to_paged_attention(ov, model, spec)
        gather_rows(model, axis=0)
        super().__init__(compile_model(core, model, device, options, defaults), device)
        with engine_errors("creating an inference request"):
            self._request: Any = self._compiled.create_infer_request()
        self._allocate(spec, options)

    def _allocate(self, spec: DecoderSpec, options: DecoderOptions) -> None:
        ports = {port.get_any_name(): port for port in self._compiled.inputs}
        names = [f"{kind}_cache.{layer}" for layer in range(spec.num_layers) for kind in ("key", "value")]
        block_size = ports["value_cache.0"].get_partial_shape()[2].get_length()
        tokens = spec.max_context if options.kv_tokens is None else options.kv_tokens
        if tokens < 1:
            raise ValueError(f"kv_tokens must be at least 1, not {tokens}")
        self.pool = BlockPool(-(-tokens // block_size), block_size)
        self._batch_invariant = options.batch_invariant
        self.caches: list[NDArray[np.generic]] = []
        """Keys and values, layer by layer: (blocks, kv_heads, …) in the layout the engine chose."""
        for name in names:
            port = ports[name]
            kind = port.get_element_type().get_type_name()
            if kind not in _STORAGE:
                raise EngineError(f"a KV cache of type {kind} is not supported; set KV_CACHE_PRECISION to u8 or f16")
            dims = [dim.get_length() for dim in list(port.get_partial_shape())[1:]]
            # zeros are committed on first touch
            cache: NDArray[np.generic] = np.zeros((self.pool.num_blocks + 1, *dims), _STORAGE[kind])  # 1: idle token
            self.caches.append(cache)
            tensor = self._ov.Tensor(cache, self._ov.Shape(list(cache.shape)), port.get_element_type())
            with engine_errors(f"binding {name}"):
                self._request.set_tensor(name, tensor)
        self.block_bytes = sum(int(cache[0].nbytes) for cache in self.caches)
        quantized = any(cache.dtype.itemsize == 1 for cache in self.caches)
        self._limits = DecoderLimits(
            max_context=spec.max_context,
            max_prompt=spec.max_context,
            max_sequences=options.max_sequences,
            prefill_chunk=options.prefill_chunk,
            kv_tokens=self.pool.num_blocks * block_size,
            kv_bytes_per_token=-(-self.block_bytes // block_size),
            kv_block=block_size if quantized else 1,  # keys share a scale over the tokens of a block, on x86
            rope_switch=spec.rope_switch,
        )

    # ---- sequences

    def new_sequence(self, expected: int = 0) -> PagedSequence:
        return self._register(BlockTable(), self._starts_on_long(expected))

    def fork(self, sequence: PagedSequence, length: int) -> PagedSequence:
        self._check_place()
        return self._register(self.pool.fork(sequence.table, length), sequence.on_long)

    def _register(self, table: BlockTable, on_long: bool) -> PagedSequence:
        self._check_place()
        sequence = PagedSequence(self, table, on_long)
        self._sequences.add(sequence)
        return sequence

    def forget(self, sequence: PagedSequence, table: BlockTable) -> None:
        self._sequences.discard(sequence)
        self.pool.crop(table, 0)

    def read(self, blocks: list[int], tokens: int) -> tuple[NDArray[np.generic], ...]:
        return tuple(cache[blocks] for cache in self.caches)  # indexing by a list copies

    def restore(self, sequence: PagedSequence, snapshot: Snapshot) -> None:
        table = sequence.table
        check_follows(snapshot, table.length, self._limits)
        check_rope_switch(table.length + snapshot.length, self._limits.rope_switch, sequence.on_long)
        blocks = -(-snapshot.length // self.pool.block_size)
        wanted = [(blocks, *cache.shape[1:], cache.dtype) for cache in self.caches]
        if [(*array.shape, array.dtype) for array in snapshot.arrays] != wanted:
            raise EngineError("the snapshot was taken from another model or with another KV precision; prefill instead")
        self.pool.append([(table, snapshot.length)])
        for cache, array in zip(self.caches, snapshot.arrays, strict=True):
            cache[table.blocks[-blocks:]] = array

    # ---- running

    def forward(self, batch: Sequence[Step]) -> list[NDArray[np.float32]]:
        self.check_open()
        check_batch(batch, self._limits, self._vocab_size)
        sequences = [self._own(step) for step in batch]
        counts = [step.tokens.size for step in batch]
        for sequence, count in zip(sequences, counts, strict=True):
            check_rope_switch(sequence.length + count, self._limits.rope_switch, sequence.on_long)

        past = [sequence.length for sequence in sequences]
        copies = self.pool.append([(s.table, count) for s, count in zip(sequences, counts, strict=True)])
        for source, target in copies:
            for cache in self.caches:
                cache[target] = cache[source]
        return self._infer(batch, sequences, past)

    def _infer(
        self, batch: Sequence[Step], sequences: Sequence[PagedSequence], past: Sequence[int]
    ) -> list[NDArray[np.float32]]:
        parts = [
            _Part(
                step.tokens,
                length,
                length + (self._rope_offset if sequence.on_long else 0),
                sequence.table.blocks,
                step.rows,
            )
            for step, sequence, length in zip(batch, sequences, past, strict=True)
        ]
        tokens, wanted = sum(len(part.tokens) for part in parts), sum(step.rows for step in batch)
        if self._batch_invariant and (tokens == 1 or wanted == 1):
            parts.append(_Part(np.zeros(1, np.int64), 0, 0, [self.pool.num_blocks], rows=1))
        counts = [len(part.tokens) for part in parts]
        ends = np.cumsum(counts)
        inputs: dict[str, NDArray[np.generic]] = {
            "input_ids": np.concatenate([part.tokens for part in parts], dtype=np.int64),
            "position_ids": np.concatenate(
                [
                    np.arange(part.position, part.position + n, dtype=np.int64)
                    for part, n in zip(parts, counts, strict=True)
                ]
            ),
            "past_lens": np.array([part.past for part in parts], np.int32),
            "subsequence_begins": np.array([0, *ends], np.int32),
            "block_indices": np.array([block for part in parts for block in part.blocks], np.int32),
            "block_indices_begins": np.cumsum([0, *(len(part.blocks) for part in parts)], dtype=np.int32),
            "max_context_len": np.array(max(part.past + n for part, n in zip(parts, counts, strict=True)), np.int32),
            ROWS: np.concatenate(
                [np.arange(end - part.rows, end, dtype=np.int64) for end, part in zip(ends, parts, strict=True)]
            ),
        }
        with engine_errors("running a batch"):
            for name, values in inputs.items():
                self._request.set_tensor(name, self._ov.Tensor(values))
            with self._stopwatch:
                self._request.infer()
            if self._weights is not None:  # the first inference has packed them
                release_file_pages(self._weights)
                self._weights = None
            logits = self._request.get_output_tensor(0).data
        bounds = np.cumsum([step.rows for step in batch])
        logits = logits.reshape(-1, self._vocab_size)
        return [logits[end - step.rows : end].copy() for step, end in zip(batch, bounds, strict=True)]

    # ---- the end

    def check_integrity(self) -> None:
        self.pool.check_integrity([sequence.table for sequence in self._sequences])
        if len(self._sequences) > self._limits.max_sequences:
            raise AssertionError(f"{len(self._sequences)} sequences are open, of {self._limits.max_sequences}")

    def close(self) -> None:
        self._request = None
        self.caches.clear()
        super().close()
