"""A decoder over graphs that onnxruntime-genai's model builder has made, as they are.

They take ``input_ids`` [1, n], ``attention_mask`` [1, total], for some models ``position_ids`` [1, n], and a KV cache
[1, kv_heads, capacity, head_dim] for each layer, whose memory the present's outputs share; they give logits of all new
tokens. One sequence is run at a time: the mask leaves no room for several of different lengths.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from devices.base import DecoderOptions, DecoderSpec, Step
from devices.dense_decoder import DenseDecoder, DenseSequence
from devices.errors import EngineError
from devices.host_kv import HostKV
from devices.kv_types import KVType, choose_kv_type
from devices.onnxruntime_profiling import OnnxRuntimeCounters
from devices.onnxruntime_session import engine_errors, open_session

_TYPES: dict[str, tuple[Any, KVType]] = {
    "tensor(float16)": (np.float16, "float16"),
    "tensor(float)": (np.float32, "float32"),
}


class OnnxRuntimeGenaiDecoder(DenseDecoder[HostKV]):
    """Implements :class:`devices.base.Decoder`. DeviceUnavailable if ``device`` cannot be used, or with another KV
    cache than the graph's; EngineError if the model is refused."""

    def __init__(self, spec: DecoderSpec, options: DecoderOptions, device: str = "onnxruntime:cpu") -> None:
        self._session: Any = open_session(spec, options, device)
        inputs = {each.name: each for each in self._session.get_inputs()}
        past = inputs.get("past_key_values.0.key")
        if past is None or past.type not in _TYPES:
            raise EngineError(f"{spec.model} has no KV cache of a type that is known: {', '.join(_TYPES)}")
        dtype, kv_type = _TYPES[past.type]
        choose_kv_type("a graph of onnxruntime-genai", options.kv_type, (kv_type,))
        self._wants_positions = "position_ids" in inputs
        self._names = [f"{layer}.{kind}" for layer in range(spec.num_layers) for kind in ("key", "value")]
        super().__init__(device, spec, options, dtype)
        if options.profile is not None:
            self.counters = OnnxRuntimeCounters(self._session, spec.model, self._stopwatch)

    def _new_kv(self) -> HostKV:
        spec = self._spec
        return HostKV(spec.heads_of_caches, self._limits.max_context, spec.head_dim, self._dtype)

    def _run(self, sequence: DenseSequence[HostKV], step: Step) -> NDArray[np.float32]:
        import onnxruntime

        count, held = step.tokens.size, sequence.length
        value = onnxruntime.OrtValue.ortvalue_from_numpy
        with engine_errors("running the model"):
            binding = self._session.io_binding()
            binding.bind_ortvalue_input("input_ids", value(step.tokens[None]))
            binding.bind_ortvalue_input("attention_mask", value(np.ones((1, held + count), np.int64)))
            if self._wants_positions:
                binding.bind_ortvalue_input("position_ids", value(np.arange(held, held + count)[None]))
            for name, cache in zip(self._names, sequence.kv.caches, strict=True):
                shared = value(cache[None])
                binding.bind_ortvalue_input(f"past_key_values.{name}", shared)
                binding.bind_ortvalue_output(f"present.{name}", shared)
            binding.bind_output("logits")
            with self._stopwatch:
                self._session.run_with_iobinding(binding)
            (logits,) = (each for each in binding.get_outputs() if each.shape()[-1] == self._spec.vocab_size)
            rows = logits.numpy()[0, count - step.rows :]
        sequence.grow(count)
        return np.asarray(rows, np.float32)

    def _release(self) -> None:
        self._session = None
