"""What an engine can be told about how it computes and not about what: speed changes, answers do not.

Left out on purpose, because they trade answers for speed: precision hints (OpenVINO's ``INFERENCE_PRECISION_HINT``,
``DYNAMIC_QUANTIZATION_GROUP_SIZE``; ONNX Runtime's ``session.qdq_matmulnbits_accuracy_level``, fast math).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from devices.host import core_groups, cores, cores_differ, physical_cores

_ON_ITS_THREADS = ("edge:cpu", "onnxruntime:cpu")
"""Devices that compute in ONNX Runtime's thread pool."""
_OPENVINO_CPU = "openvino:cpu"
_ONNXRUNTIME: dict[str, tuple[dict[str, str], ...]] = {
    # how threads wait for the next operator: asleep, or awake for longer
    "spinning": ({"session.intra_op.allow_spinning": "0"}, {"session.intra_op.spin_duration_us": "1000"}),
    # parts of a loop that get smaller towards its end: for threads that are not equally fast
    "loop blocks": ({"session.dynamic_block_base": "4"},),
}
_OPENVINO: dict[str, tuple[dict[str, str], ...]] = {
    "performance hint": ({"PERFORMANCE_HINT": "THROUGHPUT"},),
}
_OPENVINO_SMT = {"hyper-threading": ({"ENABLE_HYPER_THREADING": "YES"}, {"ENABLE_HYPER_THREADING": "NO"})}
_OPENVINO_HYBRID = {
    "core type": tuple({"SCHEDULING_CORE_TYPE": kind} for kind in ("PCORE_ONLY", "ECORE_ONLY", "ANY_CORE")),
}


def hints(device: str) -> Mapping[str, Sequence[Mapping[str, str]]]:
    """What can be hinted at → the properties (:attr:`devices.base.DecoderOptions.properties`) of each way but the
    engine's own, on this machine. ``device``: ``engine:hardware``."""
    if device in _ON_ITS_THREADS:
        return _ONNXRUNTIME
    if device != _OPENVINO_CPU:
        return {}
    return {
        **(_OPENVINO_HYBRID if cores_differ() else {}),
        **(_OPENVINO_SMT if cores() > physical_cores() else {}),
        **_OPENVINO,
    }


def pinning_choices(device: str) -> tuple[bool, ...]:
    """Whether threads may be bound to cores (True) or set free (False), where that is not what the engine does anyway.

    ONNX Runtime binds them where it chooses their number, and leaves them free where it is told.
    """
    if device == _OPENVINO_CPU:
        return (False, True)
    return (True,) if device in _ON_ITS_THREADS and len(core_groups()) > 1 else ()


def pinning(device: str, pinned: bool, threads: int | None) -> tuple[int | None, dict[str, str]]:
    """How many threads to ask for, and the properties that bind them to cores, one each as far as they go, or set them
    free. ``threads`` None: as many as the engine takes.

    ONNX Runtime binds only a number of threads that it is told. Its first thread is the caller's and stays as it is;
    processors are counted from 1 there (https://onnxruntime.ai/docs/performance/tune-performance/threading.html).
    """
    if device == _OPENVINO_CPU:
        return threads, {"ENABLE_CPU_PINNING": "YES" if pinned else "NO"}
    groups = core_groups()
    if device not in _ON_ITS_THREADS or not pinned or not groups:
        return threads, {}
    count = threads or len(groups)
    bound = (groups[thread % len(groups)] for thread in range(1, count))
    affinities = ";".join(",".join(str(processor + 1) for processor in group) for group in bound)
    return count, {"session.intra_op_thread_affinities": affinities} if affinities else {}
