"""Opening an ONNX Runtime session on an NVIDIA GPU."""

from __future__ import annotations

from typing import Any

from devices.base import DecoderOptions, DecoderSpec
from devices.errors import DeviceUnavailable
from devices.onnxruntime_session import engine_errors

PROVIDER = "CUDAExecutionProvider"


def open_cuda_session(spec: DecoderSpec, options: DecoderOptions, stream: int) -> Any:
    """An InferenceSession that runs on ``stream`` and can capture CUDA graphs.

    ``options.properties``: names with a dot are session config entries, the others options of the provider, such as
    ``gpu_mem_limit`` (bytes of its arena, over 1 MiB; activations are in it, weights and KV cache are not).
    DeviceUnavailable, EngineError.
    """
    import onnxruntime

    if PROVIDER not in onnxruntime.get_available_providers():
        raise DeviceUnavailable(
            "this onnxruntime has no CUDA; install onnxruntime-gpu in place of onnxruntime, or use --device cpu"
        )
    provider = {
        "device_id": "0",
        "user_compute_stream": str(stream),
        "enable_cuda_graph": "1",
        "arena_extend_strategy": "kSameAsRequested",  # the default doubles
    }
    config = {
        "session.use_device_allocator_for_initializers": "1",  # outside the arena, which would round them up
        "ep.cuda.fpa_intb_gemm": "1",  # 4- and 8-bit products in one kernel, whatever the number of tokens
    }
    for key, value in options.properties.items():
        (config if "." in key else provider)[key] = value
    with engine_errors(f"loading {spec.model} on CUDA"):
        onnxruntime.set_default_logger_severity(3)  # errors; they also come as exceptions
        session_options = onnxruntime.SessionOptions()
        session_options.log_severity_level = 3
        session_options.intra_op_num_threads = 1  # the host only launches
        session_options.enable_mem_pattern = False  # it plans per input shape, and every chunk has its own
        for key, value in config.items():
            session_options.add_session_config_entry(key, value)
        session = onnxruntime.InferenceSession(str(spec.model), session_options, providers=[(PROVIDER, provider)])
    if PROVIDER not in session.get_providers():  # it goes on without a provider that does not load
        raise DeviceUnavailable(
            "onnxruntime could not start CUDA; check that CUDA and cuDNN fit it (pip install "
            "'onnxruntime-gpu[cuda,cudnn]'), or use --device cpu"
        )
    return session
