"""Opening an ONNX Runtime session, and its exceptions as ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from devices.base import DecoderOptions, DecoderSpec
from devices.errors import DeviceUnavailable, EngineError
from devices.file_pages import release_file_pages
from devices.heap import map_large_blocks


def open_session(spec: DecoderSpec, options: DecoderOptions, provider: str, operators: Path | None = None) -> Any:
    """An InferenceSession. DeviceUnavailable if the provider cannot be used, EngineError if the model is refused.

    ``operators``: a shared library of operators that the graph uses beside ONNX Runtime's. They take their weights from
    the mapped file itself, so that its pages stay.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise DeviceUnavailable(f"onnxruntime does not load ({error}); pip install onnxruntime") from error
    if provider != "CPUExecutionProvider" or provider not in onnxruntime.get_available_providers():
        raise DeviceUnavailable(f"{provider} cannot run this: the KV cache is in host memory; use CPUExecutionProvider")
    with engine_errors(f"loading {spec.model}"):
        session_options = onnxruntime.SessionOptions()
        session_options.log_severity_level = 3  # errors; they also come as exceptions
        session_options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        session_options.inter_op_num_threads = 1
        session_options.intra_op_num_threads = options.threads or 0
        session_options.enable_mem_pattern = False  # it plans per input shape, and every chunk has its own
        # weights outside the arena: it would round them up to powers of two and never shrink
        session_options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        map_large_blocks()  # its arena's, which then go back to the system with the session
        for key, value in options.properties.items():
            session_options.add_session_config_entry(key, value)
        if operators is not None:
            session_options.register_custom_ops_library(str(operators))
        session = onnxruntime.InferenceSession(str(spec.model), session_options, providers=[provider])
    if operators is None:
        release_file_pages(spec.model.parent)
    return session


class engine_errors:  # a generator made a token 17 µs longer
    """A context in which ONNX Runtime's exceptions, which share no base class but Exception, become EngineError."""

    def __init__(self, doing: str) -> None:
        self._doing = doing

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception):
            raise EngineError(f"{self._doing} failed in ONNX Runtime: {error}") from error
