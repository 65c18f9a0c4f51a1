"""A decoder over ONNX Runtime's PagedAttention on an NVIDIA GPU; KV cache, inputs and logits live there.

The graph's inputs are described in :mod:`exporters.onnx_cuda_builder`. Every batch, whatever its mixture of prompt
chunks and single tokens, is one inference; forking and cropping are block-table work (:mod:`devices.block_pool`).
A batch of single tokens and a full prompt chunk replay a CUDA graph, without which launching some five hundred kernels
takes longer than running them; there is one for each number of sequences and range of lengths, captured when first met.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from devices.base import DecoderOptions, DecoderSpec
from devices.block_pool import BlockPool
from devices.cuda_inputs import StepInputs
from devices.cuda_kv import CudaBlocks
from devices.cuda_memory import CudaRuntime
from devices.errors import EngineError
from devices.kv_pool import KVPool
from devices.kv_types import choose_kv_type
from devices.onnxruntime_cuda_session import open_cuda_session
from devices.onnxruntime_session import engine_errors
from devices.paged_decoder import PagedDecoder, Part, blocks_to_hold, tokens_to_hold

_STORAGE = {"tensor(float16)": (10, np.float16), "tensor(bfloat16)": (16, np.uint16)}
"""Element type of the caches → ONNX's number for it, and the numpy type that holds it."""
_SHORT = 512
"""Lengths up to which attention takes no part of a sequence apart; above, a range of lengths ends at a power of 2."""
_IDLE_TOKEN = np.zeros(1, np.int64)


class OnnxRuntimeCudaDecoder(PagedDecoder):
    """Implements :class:`devices.base.Decoder` on the first NVIDIA GPU."""

    def __init__(self, spec: DecoderSpec, options: DecoderOptions) -> None:
        """DeviceUnavailable without a GPU and its libraries; EngineError if the model or its KV cache do not fit."""
        self._runtime = CudaRuntime()
        self._stream = self._runtime.new_stream()
        self._session: Any = None
        self._buffers: list[Any] = []
        try:
            self._session = open_cuda_session(spec, options, self._stream)
            self._allocate(spec, options)
        except BaseException:
            self._free()
            raise

    def _allocate(self, spec: DecoderSpec, options: DecoderOptions) -> None:
        cache = next((each for each in self._session.get_inputs() if each.name == "key_cache.0"), None)
        if cache is None or cache.type not in _STORAGE:
            raise EngineError(f"{spec.model} was not exported for CUDA; export it with --engine onnx-cuda")
        self._element, storage = _STORAGE[cache.type]
        choose_kv_type("onnxruntime:cuda", options.kv_type, ("float16",))
        size = cache.shape[1]
        tokens = tokens_to_hold(spec, options)
        pool = BlockPool(blocks_to_hold(tokens, options.max_sequences, size), size)
        self._kv_pool = pool
        self._spec = spec
        self._batch_invariant = options.batch_invariant
        block = (size, spec.num_kv_heads, spec.head_dim)
        blocks = pool.num_blocks + 1  # one for idle places
        self._kv = CudaBlocks(self._runtime, self._stream, 2 * spec.num_layers, blocks, block, np.dtype(storage))
        self._buffers.append(self._kv)
        super().__init__(
            "onnxruntime:cuda",
            spec,
            options,
            [KVPool(pool, self._kv)],
            kv_tokens=tokens,
            long_offset=spec.max_context,
        )
        self._fixed = self._inputs(max(options.max_sequences, options.prefill_chunk))
        self._mixed = self._inputs(options.max_sequences * options.prefill_chunk)
        self._logits = _Logits(self._runtime, self._stream, options.max_sequences, spec.vocab_size)
        self._many_logits = _Logits(self._runtime, self._stream, options.max_sequences, spec.vocab_size)
        self._buffers += [self._logits, self._many_logits]
        self._mixed_binding = self._new_binding()
        self._mixed_options = _run_options(-1)
        self._graphs: dict[tuple[int, int, int], tuple[Any, Any, NDArray[np.int32]]] = {}

    def _inputs(self, tokens: int) -> StepInputs:
        width = -(-self._spec.max_context // self._kv_pool.block_size)
        positions = self._spec.rope_switch is not None
        inputs = StepInputs(self._runtime, self._stream, tokens, self._limits.max_sequences, width, positions)
        self._buffers.append(inputs)
        return inputs

    # ---- running

    def _compute(self, parts: list[Part], pool: KVPool) -> list[NDArray[np.float32]]:
        if self._batch_invariant:  # kernels are chosen by the number of tokens
            return [rows for part in parts for rows in self._run_parts([part])]
        return self._run_parts(parts)

    def _run_parts(self, parts: list[Part]) -> list[NDArray[np.float32]]:
        with engine_errors("running a batch on CUDA"), self._stopwatch:
            single = all(len(part.tokens) == 1 for part in parts)
            full = len(parts) == 1 and len(parts[0].tokens) == self._limits.prefill_chunk and parts[0].rows <= 1
            logits = self._replay(parts) if single or full else self._run_mixed(parts)
        ends = np.cumsum([part.rows for part in parts])
        return [logits[end - part.rows : end] for end, part in zip(ends, parts, strict=True)]

    def _run_mixed(self, parts: list[Part]) -> NDArray[np.float32]:
        binding, longest = self._mixed_binding, max(part.length for part in parts)
        bounds = np.array([max(len(part.tokens) for part in parts), longest, longest], np.int32)
        wanted = max(1, sum(part.rows for part in parts))
        self._bind(binding, self._mixed.write(parts), bounds)
        self._many_logits.bind(binding, wanted)
        self._session.run_with_iobinding(binding, self._mixed_options)
        return self._many_logits.read(wanted)

    def _replay(self, parts: list[Part]) -> NDArray[np.float32]:
        """Steps of one length, by the CUDA graph for so many, filled up with idle places."""
        count, width, longest = len(parts), len(parts[0].tokens), max(part.length for part in parts)
        places = min(1 << (count - 1).bit_length(), self._limits.max_sequences)
        top = max(_SHORT, 1 << (longest - 1).bit_length())
        idle = Part(_IDLE_TOKEN, 0, 0, [self._kv_pool.num_blocks], rows=1)
        inputs = self._fixed.write([part._replace(rows=1) for part in parts] + [idle] * (places - count))
        key = (places, width, top)
        if key not in self._graphs:
            binding, lower = self._new_binding(), 0 if top == _SHORT else top // 2 + 1
            bounds = np.array([width, top, lower], np.int32)
            self._bind(binding, inputs, bounds)
            self._logits.bind(binding, places)
            self._graphs[key] = (binding, _run_options(len(self._graphs) + 1), bounds)
        binding, options, _ = self._graphs[key]
        self._session.run_with_iobinding(binding, options)
        rows = self._logits.read(count)
        kept = [i for i, part in enumerate(parts) if part.rows]
        return rows if len(kept) == count else rows[kept]

    def _new_binding(self) -> Any:
        binding = self._session.io_binding()
        for layer in range(self._spec.num_layers):
            for index, kind in enumerate(("key", "value")):
                address = self._kv.address(2 * layer + index)
                shape = self._kv.shape
                binding.bind_input(f"{kind}_cache.{layer}", "cuda", 0, self._element, shape, address)
                binding.bind_output(f"{kind}_cache_out.{layer}", "cuda", 0, self._element, shape, address)
        return binding

    def _bind(
        self, binding: Any, inputs: dict[str, tuple[int, tuple[int, ...], Any]], bounds: NDArray[np.int32]
    ) -> None:
        for name, (address, shape, dtype) in inputs.items():
            binding.bind_input(name, "cuda", 0, dtype, shape, address)
        binding.bind_input("attention_bounds", "cpu", 0, np.int32, bounds.shape, bounds.ctypes.data)

    # ---- the end

    def _release(self) -> None:
        self._graphs.clear()
        self._mixed_binding = None
        self._free()

    def _free(self) -> None:
        self._session = None
        for buffer in self._buffers:
            buffer.free()
        self._buffers.clear()
        self._runtime.close_stream(self._stream)


class _Logits:
    """The output: on the device, and a pinned copy. Addresses stay as long as no more rows are asked for."""

    def __init__(self, runtime: CudaRuntime, stream: int, rows: int, vocab_size: int) -> None:
        self._runtime = runtime
        self._stream = stream
        self._vocab_size = vocab_size
        self._reserve(rows)

    def _reserve(self, rows: int) -> None:
        self._host = self._runtime.pinned((rows, self._vocab_size), np.float32)
        self._device = self._runtime.allocate(self._host.nbytes)

    def bind(self, binding: Any, rows: int) -> None:
        """As the output of a run with ``rows`` rows."""
        if rows > len(self._host):
            self._device.free()
            self._reserve(rows)
        binding.bind_output("logits", "cuda", 0, np.float32, (rows, self._vocab_size), self._device.address)

    def read(self, rows: int) -> NDArray[np.float32]:
        """Wait for the run and copy its first ``rows`` rows."""
        found = self._host[:rows]
        self._runtime.copy(found.ctypes.data, self._device.address, found.nbytes, self._stream)
        self._runtime.synchronize(self._stream)
        return found.copy()

    def free(self) -> None:
        self._device.free()


def _run_options(graph: int) -> Any:
    """``graph``: number of the CUDA graph to capture or replay; −1: none."""
    import onnxruntime

    options = onnxruntime.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph))
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")  # the copy of the logits waits
    return options
