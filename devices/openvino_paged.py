"""A decoder over OpenVINO's PagedAttention, with a block pool of our own.

Every batch, whatever its mixture of prompt chunks and single tokens, is one inference.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from devices.base import DecoderOptions, DecoderSpec
from devices.block_pool import BlockPool
from devices.errors import EngineError
from devices.file_pages import releasing_file_pages
from devices.kv_pool import KVPool
from devices.kv_types import KVType, choose_kv_type
from devices.lazy_memory import release_pages, small_pages
from devices.openvino_graph import (
    ROWS,
    compile_model,
    engine_errors,
    gather_rows,
    new_core,
    precision_defaults,
    read_model,
    release_model,
    rope_offset,
    to_paged_attention,
)
from devices.openvino_profiling import OpenVinoCounters
from devices.paged_decoder import PagedDecoder, Part, tokens_to_hold
from devices.steps import as_rows

_STORAGE = {"u8": np.uint8, "i8": np.int8, "f16": np.float16, "bf16": np.uint16, "f32": np.float32}
"""Element type of a cache → the numpy type of equal width that holds it."""
_PRECISIONS: dict[KVType, str] = {"float32": "f32", "float16": "f16", "int8": "u8"}


class _Caches:
    """Implements :class:`devices.kv_pool.KVStorage` over keys and values, layer by layer, (blocks, …) each."""

    def __init__(self, caches: list[NDArray[np.generic]], maps: list[mmap.mmap], block_size: int) -> None:
        """``maps``: the memory of each."""
        self._caches = caches
        self._maps = maps
        self._block_size = block_size
        self.block_bytes = sum(int(cache[0].nbytes) for cache in caches)

    def read(self, blocks: list[int], tokens: int) -> tuple[NDArray[np.generic], ...]:
        return tuple(cache[blocks] for cache in self._caches)  # indexing by a list copies

    def form(self, tokens: int) -> list[tuple[tuple[int, ...], np.dtype[Any]]]:
        blocks = -(-tokens // self._block_size)
        return [((blocks, *cache.shape[1:]), cache.dtype) for cache in self._caches]

    def write(self, blocks: list[int], arrays: tuple[NDArray[np.generic], ...]) -> None:
        for cache, array in zip(self._caches, arrays, strict=True):
            cache[blocks] = array

    def release(self, blocks: range) -> None:
        for cache, memory in zip(self._caches, self._maps, strict=True):
            release_pages(memory, blocks.start * cache[0].nbytes, blocks.stop * cache[0].nbytes)

    def copy(self, source: int, target: int) -> None:
        for cache in self._caches:
            cache[target] = cache[source]


class OpenVinoDecoder(PagedDecoder):
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
        self._mapped: Any = model
        """Keeps the weights mapped: they are packed by inferences."""
        self._packed_for: set[int] = set()
        """Numbers of tokens, in powers of two, for which they have been. With VNNI the first inference packs for all;
        without, OpenVINO takes another product for one token, for some tens and for more, and each packs anew."""
        self._folder = spec.model.parent
        long_offset = rope_offset(model, spec)
        defaults = precision_defaults(model)
        if options.kv_type not in (None, "auto"):
            kv_type = choose_kv_type(f"openvino:{device.lower()}", options.kv_type, tuple(_PRECISIONS))
            defaults["KV_CACHE_PRECISION"] = _PRECISIONS[kv_type]
        if options.batch_invariant:  # 8-bit keys share a scale over a block, which a draft would widen
            choose_kv_type("OpenVINO with batch invariance", options.kv_type, ("float16", "float32"))
            defaults.setdefault("KV_CACHE_PRECISION", "f16")
        to_paged_attention(ov, model, spec)
        gather_rows(model, axis=0)
        if device == "CPU":  # it cannot read back what it writes: the operator's head sizes are not in its file
            options = replace(options, cache_dir=None)
        with releasing_file_pages(self._folder):
            self._compiled = compile_model(core, model, device, options, defaults)
        with engine_errors("creating an inference request"):
            self._request: Any = self._compiled.create_infer_request()
        self._allocate(spec, options, device, long_offset)

    def _allocate(self, spec: DecoderSpec, options: DecoderOptions, device: str, long_offset: int) -> None:
        ports = {port.get_any_name(): port for port in self._compiled.inputs}
        names = [f"{kind}_cache.{layer}" for layer in range(spec.num_layers) for kind in ("key", "value")]
        block_size = ports["value_cache.0"].get_partial_shape()[2].get_length()
        pool = BlockPool(-(-tokens_to_hold(spec, options) // block_size), block_size)
        self._batch_invariant = options.batch_invariant
        self.caches: list[NDArray[np.generic]] = []
        """Keys and values, layer by layer: (blocks, kv_heads, …) in the layout the engine chose."""
        maps: list[mmap.mmap] = []
        for name in names:
            port = ports[name]
            kind = port.get_element_type().get_type_name()
            if kind not in _STORAGE:
                raise EngineError(f"a KV cache of type {kind} is not supported; set KV_CACHE_PRECISION to u8 or f16")
            dims = [dim.get_length() for dim in list(port.get_partial_shape())[1:]]
            shape = (pool.num_blocks + 1, *dims)  # 1: idle token
            memory, cache = _cache(shape, np.dtype(_STORAGE[kind]))
            maps.append(memory)
            self.caches.append(cache)
            tensor = self._ov.Tensor(cache, self._ov.Shape(list(cache.shape)), port.get_element_type())
            with engine_errors(f"binding {name}"):
                self._request.set_tensor(name, tensor)
        quantized = any(cache.dtype.itemsize == 1 for cache in self.caches)
        super().__init__(
            f"openvino:{device.lower()}",
            spec,
            options,
            [KVPool(pool, _Caches(self.caches, maps, block_size))],
            kv_tokens=pool.num_blocks * block_size,
            long_offset=long_offset,
            kv_block=block_size if quantized else 1,  # keys share a scale over the tokens of a block, on x86
        )
        if options.profile is not None:
            self.counters = OpenVinoCounters(self._compiled, spec.vocab_size, self._stopwatch)

    def _check_room(self, growth: Sequence[tuple[KVPool, int]]) -> None:
        """The pool holds ``kv_tokens`` and not more, so that it says itself when it is full."""

    # ---- running

    def _compute(self, parts: list[Part], pool: KVPool) -> list[NDArray[np.float32]]:
        asked = list(parts)
        tokens, wanted = sum(len(part.tokens) for part in parts), sum(part.rows for part in parts)
        if self._batch_invariant and (tokens == 1 or wanted == 1):
            parts = [*parts, Part(np.zeros(1, np.int64), 0, 0, [pool.blocks.num_blocks], rows=1)]
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
            "max_context_len": np.array(max(part.length for part in parts), np.int32),
            ROWS: np.concatenate(
                [np.arange(end - part.rows, end, dtype=np.int64) for end, part in zip(ends, parts, strict=True)]
            ),
        }
        with engine_errors("running a batch"):
            for name, values in inputs.items():
                self._request.set_tensor(name, self._ov.Tensor(values))
            packed = tokens.bit_length() in self._packed_for
            with nullcontext() if packed else releasing_file_pages(self._folder), self._stopwatch:
                self._request.infer()
            self._packed_for.add(tokens.bit_length())
            if isinstance(self.counters, OpenVinoCounters):
                self.counters.ran(self._request, sum(counts), sum(part.rows for part in parts))
            logits = self._request.get_output_tensor(0).data
        bounds = np.cumsum([part.rows for part in asked])
        logits = as_rows(logits, sum(part.rows for part in parts), self._vocab_size)
        return [logits[end - part.rows : end].copy() for part, end in zip(asked, bounds, strict=True)]

    # ---- the end

    def trim(self) -> None:
        super().trim()
        with engine_errors("giving memory back"):
            self._compiled.release_memory()  # what lies between operators is as large as the largest step was

    def _release(self) -> None:
        self._request = self._mapped = None
        self.caches.clear()
        release_model(self._compiled)
        self._compiled = None


def _cache(shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> tuple[mmap.mmap, NDArray[np.generic]]:
    """Memory, and zeros in it, of which only the pages exist that were written to: numpy would ask for huge ones.
    EngineError."""
    size = math.prod(shape) * dtype.itemsize
    try:
        memory = small_pages(size)
        return memory, np.frombuffer(memory, dtype).reshape(shape)
    except (OSError, MemoryError, OverflowError, ValueError) as error:
        raise EngineError(
            f"no address space for a KV cache of {size} bytes in each layer ({error}); lower kv_tokens"
        ) from error
