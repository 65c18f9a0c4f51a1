"""A decoder over OpenVINO's stateful graphs, for attention that PagedAttention cannot compute (soft-capped scores).

Every sequence has an inference request, whose variables are its dense KV cache; forking and cropping copy it. Slower
than :mod:`devices.openvino_paged`, which is preferred wherever the graph allows
(:func:`devices.openvino_open.open_openvino`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from devices.base import DecoderOptions, DecoderSpec, Step
from devices.dense_decoder import DenseDecoder, DenseSequence
from devices.errors import EngineError
from devices.kv_types import choose_kv_type
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
)
from devices.openvino_profiling import OpenVinoCounters
from devices.steps import as_rows


class VariableKV:
    """Implements :class:`devices.dense_decoder.DenseKV` by the variables of an inference request, (1, kv_heads, tokens,
    head_dim) float32; they hold just the tokens that count."""

    def __init__(self, ov: Any, request: Any, give_back: Callable[[Any], None]) -> None:
        """``give_back`` takes the request when the sequence closes."""
        self._ov = ov
        self._give_back = give_back
        self.request = request

    def states(self) -> list[Any]:
        """The variables: keys and values, layer by layer."""

        def place(state: Any) -> tuple[int, str]:
            _, layer, _, _, kind = state.name.split(".")  # past_key_values.N.keypresent.N.key
            return int(layer), kind

        return sorted(self.request.query_state(), key=place)

    def crop(self, length: int, held: int) -> None:
        if length:
            self._set(self.read(0, length))
            return
        with engine_errors("resetting a sequence"):
            self.request.reset_state()

    def read(self, start: int, stop: int) -> tuple[NDArray[np.generic], ...]:
        with engine_errors("reading the KV cache"):
            return tuple(np.array(state.state.data[0, :, start:stop]) for state in self.states())

    def write(self, start: int, arrays: Sequence[NDArray[np.generic]]) -> None:
        before = self.read(0, start) if start else None
        self._set(arrays if before is None else [np.concatenate(p, axis=1) for p in zip(before, arrays, strict=True)])

    def copy_of(self, other: VariableKV, length: int) -> None:
        self._set(other.read(0, length))

    def _set(self, arrays: Sequence[NDArray[np.generic]]) -> None:
        with engine_errors("writing the KV cache"):
            for state, array in zip(self.states(), arrays, strict=True):
                state.state = self._ov.Tensor(np.ascontiguousarray(array[None]))

    def close(self) -> None:
        request, self.request = self.request, None
        if request is not None:
            self._give_back(request)


class OpenVinoDenseDecoder(DenseDecoder[VariableKV]):
    """Implements :class:`devices.base.Decoder` on OpenVINO's ``device``, one step at a time.

    Caches are float32 and grow with their sequences. EngineError when OpenVINO cannot open ``spec.model``.
    """

    def __init__(self, spec: DecoderSpec, options: DecoderOptions, device: str = "CPU") -> None:
        choose_kv_type(f"openvino:{device.lower()}, with this model's attention,", options.kv_type, ("float32",))
        ov, core = new_core()
        model = read_model(core, spec.model)
        super().__init__(f"openvino:{device.lower()}", spec, options, np.float32, long_offset=rope_offset(model, spec))
        self._ov = ov
        gather_rows(model, axis=1)
        defaults = {"INFERENCE_PRECISION_HINT": precision_defaults(model)["INFERENCE_PRECISION_HINT"]}
        self._compiled = compile_model(core, model, device, options, defaults)
        self._spare: list[Any] = []
        if options.profile is not None:
            self.counters = OpenVinoCounters(self._compiled, spec.vocab_size, self._stopwatch)

    def _new_kv(self) -> VariableKV:
        with engine_errors("creating an inference request"):
            request = self._spare.pop() if self._spare else self._compiled.create_infer_request()
        return VariableKV(self._ov, request, self._keep)

    def _keep(self, request: Any) -> None:
        """A closing sequence's request, for the next one; none that cannot be reset."""
        with suppress(EngineError), engine_errors("resetting a sequence"):
            request.reset_state()
            self._spare.append(request)

    def _run(self, sequence: DenseSequence[VariableKV], step: Step) -> NDArray[np.float32]:
        count, start = step.tokens.size, sequence.length
        first = self._position(sequence)
        inputs: dict[str, NDArray[np.generic]] = {
            "input_ids": step.tokens.astype(np.int64)[None],
            "attention_mask": np.ones((1, start + count), np.int64),
            "position_ids": np.arange(first, first + count, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
            ROWS: np.arange(count - step.rows, count, dtype=np.int64),
        }
        request = sequence.kv.request
        with engine_errors("running a step"):
            for name, values in inputs.items():
                request.set_tensor(name, self._ov.Tensor(values))
            with self._stopwatch:
                request.infer()
            if isinstance(self.counters, OpenVinoCounters):
                self.counters.ran(request, count, step.rows)
            logits = np.array(request.get_output_tensor(0).data, np.float32)
        sequence.grow(count)
        return as_rows(logits, step.rows, self._spec.vocab_size)

    # ---- the end

    def check_integrity(self) -> None:
        super().check_integrity()
        for sequence in self._sequences:
            for state in sequence.kv.states() if sequence.length else []:
                if state.state.shape[2] != sequence.length:
                    raise AssertionError(f"{state.name} holds {state.state.shape[2]} tokens, not {sequence.length}")

    def _release(self) -> None:
        self._spare.clear()
        release_model(self._compiled)
        self._compiled = None
