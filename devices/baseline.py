"""A model run as a script of a page would: the whole prompt in one call, then a token each, on an unfused graph.

What the ladder of ``edge-glm bench`` begins at, and a plain twin of every decoder: one sequence, keys and values go in
and come out of every call, engines are opened as they come. The graph is that of
:mod:`exporters.onnx_baseline_builder`, which both engines read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from devices.base import DecoderSpec
from devices.errors import DeviceUnavailable, EngineError

_HIDDEN = np.float32(-1e9)
"""Added to the score of a token that is not seen; -inf would make a padded row NaN."""


class Baseline(ABC):
    """One sequence of a model. Memory and time are what the engine takes by itself: there is no budget here."""

    def __init__(self, spec: DecoderSpec) -> None:
        self._spec = spec
        self._caches = [f"{layer}.{kind}" for layer in range(spec.num_layers) for kind in ("key", "value")]
        self._past: dict[str, Any] = {}
        self._held = 0
        self._first_row = 0

    def begin(self, expected: int) -> None:
        """A new sequence, which will grow to ``expected`` tokens."""
        spec = self._spec
        counts = zip(self._caches, spec.heads_of_caches, strict=True)
        self._past = {
            f"past.{name}": self._tensor(np.zeros((heads, 0, spec.head_dim), np.float32)) for name, heads in counts
        }
        self._held = 0
        long = spec.rope_switch is not None and expected > spec.rope_switch
        self._first_row = spec.max_context if long else 0

    def forward(self, tokens: NDArray[np.int64], rows: int = 1) -> NDArray[np.float32]:
        """Append ``tokens`` (n,); logits (rows, vocab) after the last ``rows`` of them.

        ValueError without :meth:`begin`, or past the model's context; EngineError.
        """
        if not self._past or self._held + len(tokens) > self._spec.max_context:
            raise ValueError(f"{len(tokens)} tokens after {self._held} of a context of {self._spec.max_context}")
        count, places = len(tokens), np.arange(self._held, self._held + len(tokens))
        inputs: dict[str, NDArray[Any]] = {
            "input_ids": tokens,
            "position_ids": places + self._first_row,
            "row_index": np.arange(count - rows, count),
        }
        for window in set(self._spec.sliding_windows or (None,)):
            seen = np.arange(self._held + count)[None, :] - places[:, None]  # at most 0 for what came before
            hidden = (seen > 0) if window is None else (seen > 0) | (seen <= -window)
            inputs["mask" if window is None else f"mask.{window}"] = np.where(hidden, _HIDDEN, np.float32(0))
        feeds = self._past | {name: self._tensor(value) for name, value in inputs.items()}
        logits, caches = self._run(feeds, ["logits", *(f"present.{name}" for name in self._caches)])
        self._past = {f"past.{name}": cache for name, cache in zip(self._caches, caches, strict=True)}
        self._held += count
        return logits

    @abstractmethod
    def _tensor(self, value: NDArray[Any]) -> Any:
        """As the engine takes it."""

    @abstractmethod
    def _run(self, feeds: Mapping[str, Any], outputs: Sequence[str]) -> tuple[NDArray[np.float32], list[Any]]:
        """The first output as an array, the others as the engine takes them again."""

    @abstractmethod
    def close(self) -> None:
        """Give the model back. Idempotent."""


class OnnxRuntimeBaseline(Baseline):
    """On ONNX Runtime's CPU provider. DeviceUnavailable, EngineError."""

    def __init__(self, spec: DecoderSpec, threads: int | None = None) -> None:
        super().__init__(spec)
        try:
            import onnxruntime
        except ImportError as error:
            raise DeviceUnavailable(f"onnxruntime does not load ({error}); pip install onnxruntime") from error
        from devices.onnxruntime_session import engine_errors

        self._engine, self._errors = onnxruntime, engine_errors
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads or 0
        with engine_errors(f"loading {spec.model}"):
            self._session = onnxruntime.InferenceSession(str(spec.model), options, ["CPUExecutionProvider"])

    def _tensor(self, value: NDArray[Any]) -> Any:
        return self._engine.OrtValue.ortvalue_from_numpy(value)

    def _run(self, feeds: Mapping[str, Any], outputs: Sequence[str]) -> tuple[NDArray[np.float32], list[Any]]:
        with self._errors("a step"):
            logits, *caches = self._session.run_with_ort_values(outputs, feeds)
            return logits.numpy(), caches

    def close(self) -> None:
        self._session, self._past = None, {}


class OpenVinoBaseline(Baseline):
    """On OpenVINO's CPU. DeviceUnavailable, EngineError."""

    def __init__(self, spec: DecoderSpec, threads: int | None = None) -> None:
        super().__init__(spec)
        from devices.openvino_import import import_openvino

        try:
            self._engine = import_openvino()
        except ImportError as error:
            raise DeviceUnavailable(f"openvino does not load ({error}); pip install openvino") from error
        properties = {"INFERENCE_PRECISION_HINT": "f32"}  # what the weights are; some CPUs would take bf16
        if threads is not None:
            properties["INFERENCE_NUM_THREADS"] = str(threads)
        try:
            self._request = self._engine.Core().compile_model(str(spec.model), "CPU", properties).create_infer_request()
        except RuntimeError as error:
            raise EngineError(f"loading {spec.model} failed in OpenVINO: {error}") from error

    def _tensor(self, value: NDArray[Any]) -> Any:
        return self._engine.Tensor(np.ascontiguousarray(value))

    def _run(self, feeds: Mapping[str, Any], outputs: Sequence[str]) -> tuple[NDArray[np.float32], list[Any]]:
        try:
            self._request.infer(feeds, share_inputs=True)
            logits, *caches = (self._request.get_tensor(name).data.copy() for name in outputs)
        except RuntimeError as error:
            raise EngineError(f"a step failed in OpenVINO: {error}") from error
        return logits, [self._tensor(cache) for cache in caches]

    def close(self) -> None:
        self._request, self._past = None, {}


def open_baseline(spec: DecoderSpec, engine: str, threads: int | None = None) -> Baseline:
    """``engine``: ``onnxruntime`` or ``openvino``. DeviceUnavailable, EngineError."""
    return (OpenVinoBaseline if engine == "openvino" else OnnxRuntimeBaseline)(spec, threads)
