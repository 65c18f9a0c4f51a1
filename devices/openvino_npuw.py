"""Models compiled to static shapes by OpenVINO's NPUW: how they are opened, and what one takes in and remembers.

NPUW cuts a stateful model into one that reads prompts in chunks, one that appends a token, and the head; each has
fixed shapes. What it does with a call depends on its position and on what was asked of its one state,
``npuw_stored_tokens_state``, before (github.com/openvinotoolkit/openvino, src/plugins/intel_npu/src/plugin/npuw).
"""

from __future__ import annotations

import io
import platform
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from devices.base import DecoderOptions, DecoderSpec
from devices.compile_cache import CompileCache, cache_key
from devices.errors import EngineError
from devices.openvino_graph import compile_properties, engine_errors, new_core, read_model
from devices.stopwatch import Stopwatch

PROMPT = 1024
"""Tokens of the longest prompt, unless asked otherwise: NPUW's default."""
RESPONSE = 1024
"""Tokens that an answer to the longest prompt may have. Every step attends over all of them, used or not."""
_ALIGNMENT = 64
"""NPUW rounds both up to a multiple of it."""
_LEAST_CHUNK = 16
_LAYERS_TO_CUT = 5
"""Models of fewer layers NPUW fails to cut into repeating parts ("references undeclared parameters", 2026.4.1)."""
_STATE = "npuw_stored_tokens_state"


@dataclass(frozen=True)
class StaticShapes:
    """What a model is compiled for, in tokens."""

    max_prompt: int
    max_context: int
    """Prompt and answer."""
    chunk: int
    """A power of two; a longer prompt is computed in so many at once, and prefixes are kept in whole ones."""

    def properties(self) -> dict[str, str]:
        """NPUW's, for at least these."""
        prompt = -(-self.max_prompt // _ALIGNMENT) * _ALIGNMENT
        prompt = -(-prompt // self.chunk) * self.chunk
        return {
            "NPU_USE_NPUW": "YES",
            "NPUW_LLM": "YES",
            "NPUW_LLM_BATCH_DIM": "0",
            "NPUW_LLM_SEQ_LEN_DIM": "2",
            "NPUW_LLM_MAX_PROMPT_LEN": str(prompt),
            # one more: NPUW has no place left for the last token of all
            "NPUW_LLM_MIN_RESPONSE_LEN": str(max(self.max_context - prompt, 0) + 1),
            "NPUW_LLM_PREFILL_HINT": "DYNAMIC",
            "NPUW_LLM_PREFILL_CHUNK_SIZE": str(self.chunk),
            "NPUW_LLM_ENABLE_CONTINUOUS_PREFILL": "YES",
            # else an answer may outgrow the cache it began in; the mask of the next larger one is never cleared
            "NPUW_LLM_GENERATE_PYRAMID": "NO",
        }


def static_shapes(spec: DecoderSpec, options: DecoderOptions) -> StaticShapes:
    """Shapes for ``spec`` as ``options`` asks. ValueError if ``max_prompt`` or ``kv_tokens`` is below 1."""
    for name, value in (("max_prompt", options.max_prompt), ("kv_tokens", options.kv_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    prompt = options.max_prompt or PROMPT
    # longrope: NPUW takes positions from 0 on only, by which our graphs could not tell the long factors
    bounds = (prompt + RESPONSE, spec.max_context, options.kv_tokens, spec.rope_switch)
    context = min(bound for bound in bounds if bound is not None)
    prompt = max(min(prompt, context - 1), 1)
    chunk = _LEAST_CHUNK
    while 2 * chunk <= min(options.prefill_chunk, prompt // 2):
        chunk *= 2
    return StaticShapes(prompt, context, chunk)


def open_npuw(
    spec: DecoderSpec, options: DecoderOptions, shapes: StaticShapes, stopwatch: Stopwatch, *, emulated: bool
) -> NpuwRequest:
    """Compile ``spec.model``, or take it from ``options.cache_dir`` if it is there. EngineError.

    May take minutes, in which other threads go on: OpenVINO holds no lock of Python's meanwhile.
    """
    ov, core = new_core()
    properties = compile_properties(replace(options, cache_dir=None), {**shapes.properties(), **_around_faults(spec)})
    if emulated:
        properties["NPUW_DEVICES"] = "CPU"
        with engine_errors("setting the CPU's precision"):
            # for the whole core: what is imported does not know with which precision it was compiled
            core.set_property("CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def make() -> tuple[Any, None]:
        model = read_model(core, spec.model)
        with engine_errors(f"compiling for the NPU with {properties}"):
            return core.compile_model(model, "NPU", properties), None

    def take(blob: NDArray[np.uint8]) -> tuple[Any, NDArray[np.uint8] | None]:
        weights = {"WEIGHTS_PATH": str(spec.model.with_suffix(".bin"))}  # a blob may have none
        with engine_errors("importing a compiled model"):
            return core.import_model(ov.Tensor(blob, shared_memory=True), "NPU", {**properties, **weights}), blob

    def dump(opened: tuple[Any, NDArray[np.uint8] | None]) -> bytes:
        stream = io.BytesIO()
        with engine_errors("exporting the compiled model"):
            opened[0].export_model(stream)
        return stream.getvalue()

    if options.cache_dir is None:
        return NpuwRequest(ov, *make(), stopwatch)
    try:
        key = cache_key(spec.model, properties, _made_by(core, emulated))
    except OSError as error:
        raise EngineError(f"cannot read {spec.model}: {error}; export the model again") from error
    return NpuwRequest(ov, *CompileCache(options.cache_dir).open(key, take, make, dump), stopwatch)


def _around_faults(spec: DecoderSpec) -> dict[str, str]:
    """Properties by which NPUW computes right what by its defaults (2026.4.1) it does not."""
    properties = {}
    if spec.num_layers < _LAYERS_TO_CUT:
        properties["NPUW_ONLINE_PIPELINE"] = "NONE"
    if len(set(spec.sliding_windows)) > 1:  # its attention in steps has one mask for all layers: wrong logits
        properties["NPUW_LLM_PREFILL_ATTENTION_HINT"] = "STATIC"
    return properties


def _made_by(core: Any, emulated: bool) -> dict[str, str]:
    """What a blob is only good for."""
    device = "CPU" if emulated else "NPU"
    known = {"machine": platform.machine()}
    for name in ("FULL_DEVICE_NAME", "DEVICE_ARCHITECTURE", "NPU_DRIVER_VERSION", "NPU_COMPILER_VERSION"):
        with suppress(RuntimeError):  # not every plugin tells
            known[name] = str(core.get_property(device, name))
    for plugin in ("NPU", "CPU"):  # parts of a model may run on the CPU
        known |= {name: version.build_number for name, version in core.get_versions(plugin).items()}
    return known


class NpuwRequest:
    """The inference request of a compiled model, and the only one: its cache's length is kept in the model."""

    def __init__(self, ov: Any, compiled: Any, blob: NDArray[np.uint8] | None, stopwatch: Stopwatch) -> None:
        """``blob``: what ``compiled`` was imported from and may read as long as it lives.

        EngineError if the model gives no request, or one that cannot keep a prefix.
        """
        self._blob = blob
        self._ov = ov
        self._stopwatch = stopwatch
        with engine_errors("creating an inference request"):
            self._request: Any = compiled.create_infer_request()
            states = {state.name: state for state in self._request.query_state()}
        if _STATE not in states:
            raise EngineError(f"this version of OpenVINO has no {_STATE}; install openvino 2026.4 or later")
        self._state: Any = states[_STATE]
        self._stored = 0
        self._appending = False
        """The cache has gone from the model that reads prompts to the one that appends. A prefix is kept only there."""

    def reset(self) -> None:
        """Whatever is held is of no use; the next call is :meth:`read` from the start."""
        with engine_errors("resetting the KV cache"):
            self._state.reset()
        self._stored, self._appending = 0, False

    def keep(self, length: int) -> int:
        """Ask for the first ``length`` tokens held; returns how many are granted. The next call reads what follows.

        Granted are whole chunks of what was read, not appended, up to a chunk below the longest prompt.
        """
        self._settle()
        with engine_errors("keeping a prefix"):
            self._state.state = self._ov.Tensor(np.array([length], np.int64))
            return int(self._state.state.data[0])

    def read(self, tokens: Sequence[int], start: int) -> NDArray[np.float32]:
        """Tokens of a prompt behind the ``start`` granted ones, all in one call; logits of the last, (1, vocab)."""
        logits = self._infer(tokens, start)
        self._appending = False
        return logits

    def append(self, token: int, start: int) -> NDArray[np.float32]:
        """One more token behind the first ``start`` of those held; its logits, (1, vocab)."""
        if start < self._stored:
            self._settle()
        logits = self._infer([token], start, dropped=self._stored - start)
        self._appending = True
        return logits

    def close(self) -> None:
        """Free the model. Idempotent."""
        self._request = self._state = self._blob = None

    def _settle(self) -> None:
        """Append some token, so that the cache is where it can be cut: right after reading it is not, and NPUW would
        take the wrong tokens for its newest."""
        if not self._appending:
            self._infer([0], self._stored)
            self._appending = True

    def _infer(self, tokens: Sequence[int], start: int, dropped: int = 0) -> NDArray[np.float32]:
        """``dropped``: tokens held behind ``start``. NPUW overwrites them one by one, but attends to all of them until
        their part of the mask is cleared."""
        end = start + len(tokens)
        mask = np.ones(end + dropped, np.int64)
        mask[start : start + dropped] = 0
        inputs: dict[str, NDArray[np.generic]] = {
            "input_ids": np.array(tokens, np.int64)[None],
            "attention_mask": mask[None],
            "position_ids": np.arange(start, end, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        with engine_errors("running a step"):
            for name, values in inputs.items():
                self._request.set_tensor(name, self._ov.Tensor(values))
            with self._stopwatch:
                self._request.infer()
            logits = np.array(self._request.get_output_tensor(0).data, np.float32)
        self._stored = end
        return logits.reshape(-1, logits.shape[-1])[-1:]
