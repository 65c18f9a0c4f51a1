"""Opening an ONNX Runtime session, and its exceptions as ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from devices.base import DecoderOptions, DecoderSpec
from devices.errors import DeviceUnavailable, EngineError
from devices.file_pages import release_file_pages
from devices.heap import map_large_blocks
from devices.plugins import PLUGINS, plugin_hardware, plugin_options


def open_session(spec: DecoderSpec, options: DecoderOptions, device: str, operators: Path | None = None) -> Any:
    """An InferenceSession on a plugin's device (:data:`devices.plugins.PLUGINS`), else on the CPU. DeviceUnavailable if
    it cannot be used, EngineError if the model is refused.

    ``operators``: a shared library of operators that the graph uses beside ONNX Runtime's. They take their weights from
    the mapped file itself, so that its pages stay.
    """
    hardware = plugin_hardware(device)[:1] if device in PLUGINS else ()

    def prepare(session_options: Any) -> None:
        if operators is not None:
            session_options.register_custom_ops_library(str(operators))
        if hardware:  # what it does not take goes to the CPU's provider
            session_options.add_provider_for_devices(list(hardware), plugin_options(device, options.threads))

    if operators is None:
        map_large_blocks()
    session = new_session(spec.model, options, None if hardware else ["CPUExecutionProvider"], prepare)
    if operators is None:
        release_file_pages(spec.model.parent)
    return session


def new_session(
    model: Path,
    options: DecoderOptions,
    providers: Sequence[Any] | None,
    prepare: Callable[[Any], None] = lambda session_options: None,
) -> Any:
    """As ``options`` say, and ``prepare`` by what it does to the SessionOptions. ``providers``: None where that names
    them. DeviceUnavailable without ONNX Runtime, EngineError if the model is refused."""
    try:
        import onnxruntime
    except ImportError as error:
        raise DeviceUnavailable(f"onnxruntime does not load ({error}); pip install onnxruntime") from error
    with engine_errors(f"loading {model}"):
        session_options = onnxruntime.SessionOptions()
        session_options.log_severity_level = 3  # errors; they also come as exceptions
        session_options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        session_options.inter_op_num_threads = 1
        session_options.intra_op_num_threads = options.threads or 0
        session_options.enable_mem_pattern = False  # it plans per input shape, and every chunk has its own
        # weights outside the arena: it would round them up to powers of two and never shrink
        session_options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        if options.profile is not None:
            session_options.enable_profiling = True
            session_options.profile_file_prefix = str(options.profile / "onnxruntime")
        for key, value in options.properties.items():
            session_options.add_session_config_entry(key, value)
        prepare(session_options)
        return onnxruntime.InferenceSession(str(model), session_options, providers=providers)


class engine_errors:  # a generator made a token 17 µs longer
    """A context in which ONNX Runtime's exceptions, which share no base class but Exception, become EngineError."""

    def __init__(self, doing: str) -> None:
        self._doing = doing

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception):
            raise EngineError(f"{self._doing} failed in ONNX Runtime: {error}") from error
