"""Sentence encoders on a device: batches of texts in, one vector each out.

The graph is that of :mod:`exporters.encoder.graph`. Not thread safe.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from devices.base import DecoderOptions
from devices.errors import DeviceUnavailable, EngineError
from devices.file_pages import release_file_pages
from devices.heap import map_large_blocks

DEVICES = ("onnxruntime:cpu", "openvino:cpu", "openvino:gpu")
"""Devices that encoders run on, by what was fastest (tests/bench/NOTES.md)."""


@dataclass(frozen=True)
class EncoderSpec:
    model: Path
    hidden_size: int
    max_tokens: int
    """Of a text, with the tokens that stand around it."""
    vocab_size: int
    first_position: int


class Encoder(ABC):
    def __init__(self, spec: EncoderSpec) -> None:
        self._spec = spec

    def embed(self, texts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """(texts, hidden) of token ids; all run at once, padded to the longest.

        ValueError for a text without tokens, one that is too long or an id outside the vocabulary; EngineError.
        """
        spec = self._spec
        longest = max(map(len, texts), default=0)
        if not texts:
            return np.zeros((0, spec.hidden_size), np.float32)
        if not 1 <= min(map(len, texts)) <= longest <= spec.max_tokens:
            raise ValueError(f"texts have 1 to {spec.max_tokens} tokens, not {min(map(len, texts))} to {longest}")
        ids = np.zeros((len(texts), longest), np.int64)
        mask = np.zeros((len(texts), longest), np.float32)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = text
            mask[row, : len(text)] = 1
        if ids.min() < 0 or ids.max() >= spec.vocab_size:
            raise ValueError(f"token ids are from 0 to {spec.vocab_size - 1}")
        places = np.arange(longest, dtype=np.int64) + spec.first_position
        return self._run({"input_ids": ids, "mask": mask, "position_ids": places})

    @abstractmethod
    def _run(self, inputs: dict[str, NDArray[Any]]) -> NDArray[np.float32]: ...

    @abstractmethod
    def close(self) -> None:
        """Give the model back. Idempotent."""


class OnnxRuntimeEncoder(Encoder):
    def __init__(self, spec: EncoderSpec, threads: int | None) -> None:
        super().__init__(spec)
        from devices.onnxruntime_session import engine_errors, new_session

        self._errors = engine_errors
        map_large_blocks()
        self._session = new_session(spec.model, DecoderOptions(threads=threads), ["CPUExecutionProvider"])
        release_file_pages(spec.model.parent)

    def _run(self, inputs: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
        with self._errors("embedding"):
            (found,) = self._session.run(["embedding"], inputs)
        return np.asarray(found, np.float32)

    def close(self) -> None:
        self._session = None


class OpenVinoEncoder(Encoder):
    def __init__(self, spec: EncoderSpec, threads: int | None, device: str, cache_dir: Path | None) -> None:
        super().__init__(spec)
        from devices.openvino_import import import_openvino

        try:
            openvino = import_openvino()
        except ImportError as error:
            raise DeviceUnavailable(f"openvino does not load ({error}); pip install openvino") from error
        properties: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        if device == "CPU":
            properties["INFERENCE_PRECISION_HINT"] = "f32"  # where the CPU has bf16, that would be 0.999 of the vector
            if threads is not None:
                properties["INFERENCE_NUM_THREADS"] = threads
        elif cache_dir is not None:
            properties["CACHE_DIR"] = str(cache_dir)
        try:
            self._request = openvino.Core().compile_model(str(spec.model), device, properties).create_infer_request()
        except RuntimeError as error:
            raise EngineError(f"loading {spec.model} failed in OpenVINO: {error}") from error
        release_file_pages(spec.model.parent)

    def _run(self, inputs: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
        try:
            self._request.infer(inputs, share_inputs=True)
            found: NDArray[np.float32] = self._request.get_tensor("embedding").data.copy()
        except RuntimeError as error:
            raise EngineError(f"embedding failed in OpenVINO: {error}") from error
        return found

    def close(self) -> None:
        self._request = None


def open_encoder(spec: EncoderSpec, device: str, threads: int | None = None, cache_dir: Path | None = None) -> Encoder:
    """On one of :data:`DEVICES`. DeviceUnavailable, EngineError."""
    if device.startswith("openvino:"):
        return OpenVinoEncoder(spec, threads, device.partition(":")[2].upper(), cache_dir)
    return OnnxRuntimeEncoder(spec, threads)
