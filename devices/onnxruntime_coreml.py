"""A decoder over graphs of static shapes, which CoreML takes; to test it without a Mac, on ONNX Runtime's CPU provider.

The graphs are described in :mod:`exporters.onnx_coreml_builder`: one reads a fixed number of prompt tokens, the other
one token. Every sequence has its KV cache in host memory, of the capacity that the graphs were made for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from devices.base import DecoderOptions, DecoderSpec, Step
from devices.dense_decoder import DenseDecoder, DenseSequence
from devices.errors import EngineError
from devices.host_kv import HostKV
from devices.kv_types import KVType, choose_kv_type
from devices.onnxruntime_session import engine_errors, new_session

DECODE_FILE = "decode.onnx"
_HIDDEN = -3e4
"""Added to scores that do not count; float16 has no smaller number by much."""
_TYPES: dict[str, tuple[Any, KVType]] = {
    "tensor(float16)": (np.float16, "float16"),
    "tensor(float)": (np.float32, "float32"),
}


def coreml_options(cache_dir: Path | None) -> dict[str, str]:
    """Of the provider (https://onnxruntime.ai/docs/execution-providers/CoreML-ExecutionProvider.html).

    Of a graph's compiled form the provider checks only the key that the graph carries: every version of the provider
    has a folder of its own.
    """
    import onnxruntime

    options = {"ModelFormat": "MLProgram", "MLComputeUnits": "ALL", "RequireStaticInputShapes": "1"}
    if cache_dir is not None:
        options["ModelCacheDirectory"] = str(cache_dir / f"coreml-{onnxruntime.__version__}")
    return options


class OnnxRuntimeCoreMLDecoder(DenseDecoder[HostKV]):
    """Implements :class:`devices.base.Decoder`. ``emulated``: on the CPU's provider.

    Of the rows of logits asked for, all but the first take a step of their own. DeviceUnavailable with another KV cache
    than the graph's, EngineError if the model is refused.
    """

    def __init__(self, spec: DecoderSpec, options: DecoderOptions, emulated: bool = False) -> None:
        name = "onnxruntime:coreml-emulated" if emulated else "onnxruntime:coreml"
        providers: list[Any] = ["CPUExecutionProvider"]
        if not emulated:
            providers.insert(0, ("CoreMLExecutionProvider", coreml_options(options.cache_dir)))
        self._sessions = [
            new_session(path, options, providers) for path in (spec.model, spec.model.with_name(DECODE_FILE))
        ]
        shapes = {each.name: each for each in self._sessions[0].get_inputs()}
        past = shapes.get("past.0.key")
        if past is None or past.type not in _TYPES:
            raise EngineError(f"{spec.model} was not exported for CoreML; export it with --engine onnx-coreml")
        dtype, kv_type = _TYPES[past.type]
        choose_kv_type(name, options.kv_type, (kv_type,))
        self._step, self._capacity = shapes["input_ids"].shape[0], past.shape[1]
        self._windows = {key: _window(key) for key in shapes if key.startswith("mask")}
        super().__init__(name, spec, options, dtype, max_context=self._capacity, long_offset=self._capacity)

    def _new_kv(self) -> HostKV:
        spec = self._spec
        return HostKV(spec.heads_of_caches, self._capacity, spec.head_dim, self._dtype)

    def _run(self, sequence: DenseSequence[HostKV], step: Step) -> NDArray[np.float32]:
        """What comes before the second row of logits is read as a prompt, then a token at a time."""
        tokens, rows = step.tokens, []
        read = tokens.size - max(step.rows - 1, 0)
        for start in range(0, read, self._step):
            last = self._call(sequence, tokens[start : min(start + self._step, read)])
        rows += [last] * (step.rows > 0)
        rows += [self._call(sequence, tokens[place : place + 1]) for place in range(read, tokens.size)]
        return np.concatenate(rows) if rows else np.empty((0, self._spec.vocab_size), np.float32)

    def _call(self, sequence: DenseSequence[HostKV], tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """(1, vocab): logits after the last of ``tokens``, which are filled up to the graph's number."""
        count, held = tokens.size, sequence.length
        session = self._sessions[count == 1]
        size = 1 if count == 1 else self._step
        ids = np.zeros(size, np.int64)
        ids[:count] = tokens
        first = self._position(sequence)
        # what fills up may lie past the tables' end
        positions = np.minimum(np.arange(first, first + size), first + count - 1)
        inputs: dict[str, NDArray[np.generic]] = {
            "input_ids": ids,
            "position_ids": positions,
            "row_index": np.array([count - 1]),
        }
        inputs |= {name: self._mask(held, size, window) for name, window in self._windows.items()}
        names = [f"{layer}.{kind}" for layer in range(self._spec.num_layers) for kind in ("key", "value")]
        inputs |= {f"past.{name}": cache for name, cache in zip(names, sequence.kv.caches, strict=True)}
        with engine_errors("running the model"), self._stopwatch:
            logits, *new = session.run(["logits", *(f"new.{name}" for name in names)], inputs)
        sequence.kv.write(held, [array[:, :count] for array in new])
        sequence.grow(count)
        return np.asarray(logits, np.float32)

    def _mask(self, held: int, size: int, window: int | None) -> NDArray[np.generic]:
        """(size, capacity + size): 0 for what a token sees, cached tokens first."""
        own = np.arange(held, held + size)[:, None]
        key = np.concatenate([np.arange(self._capacity), np.arange(held, held + size)])[None, :]
        there = np.concatenate([np.arange(self._capacity) < held, np.ones(size, bool)])[None, :]
        seen = there & (key <= own) & (own - key < (window or held + size))
        return np.where(seen, 0, _HIDDEN).astype(self._dtype)

    def _release(self) -> None:
        self._sessions.clear()


def _window(name: str) -> int | None:
    """Of the layers with the mask of that name."""
    _, _, window = name.partition(".")
    return int(window) if window else None
