"""Our own operators for ONNX Runtime on the CPU: where the shared library is, and what it can use of the processor.

It is built from ``kernels/`` when Edge-GLM is installed, if there is a C++ compiler for x86-64. Beside
``RegisterCustomOps``, which ONNX Runtime calls, it has ``const char* edge_kernels_instructions()``: the instruction set
that its kernels take on this processor, empty if it has none of those they are made for; and
``int64_t edge_kernels_multiply(int64_t rounds, int floats)``, which multiplies bytes, or floats, in registers and tells
how many.
"""

from __future__ import annotations

import ctypes
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

from devices.errors import DeviceUnavailable

_FOLDER = Path(__file__).parent
_REINSTALL = "pip install --force-reinstall --no-deps edge-glm"
_OTHERWISE = "or use --device onnxruntime:cpu"


def kernels_library() -> Path:
    """The shared library, loadable and with kernels for this processor; DeviceUnavailable, with the next step."""
    library = _find()
    if not _ask(library):
        raise DeviceUnavailable(
            "Edge-GLM's kernels need a processor with AVX2 or AVX-512 VNNI, which this one has not; "
            "use --device onnxruntime:cpu"
        )
    return library


def instructions() -> str:
    """``avx512vnni``, ``avxvnni`` or ``avx2``: what the kernels use here.

    DeviceUnavailable as :func:`kernels_library`.
    """
    return _ask(kernels_library())


def peak_rate(threads: int, *, floats: bool, seconds: float = 0.2) -> float:
    """Operations a second (a product and a sum are two) that ``threads`` reach with bytes, or floats, in registers:
    what products of quantized matrices, or others, can come to at most with these instructions. The best of several
    tries, ``seconds`` in all.

    DeviceUnavailable as :func:`kernels_library`.
    """
    function = _load(kernels_library()).edge_kernels_multiply
    function.restype, function.argtypes = ctypes.c_int64, (ctypes.c_int64, ctypes.c_int)

    def multiply(rounds: int) -> int:
        return int(function(rounds, floats))  # which lets go of Python's lock

    rounds, best, end = 1 << 16, 0.0, time.perf_counter() + seconds
    with ThreadPoolExecutor(threads) as pool:
        while best == 0.0 or time.perf_counter() < end:
            started = time.perf_counter()
            products = sum(pool.map(multiply, [rounds] * threads))
            took = time.perf_counter() - started
            if took < seconds / 16:
                rounds *= 2  # too short to be timed
            else:
                best = max(best, 2 * products / took)
    return best


def _find() -> Path:
    machine = platform.machine()
    if machine.lower() not in ("x86_64", "amd64"):
        raise DeviceUnavailable(
            f"Edge-GLM's kernels are for x86-64 processors, and this one is {machine}; use --device onnxruntime:cpu"
        )
    for suffix in EXTENSION_SUFFIXES:
        library = _FOLDER / f"_kernels{suffix}"
        if library.is_file():
            return library
    raise DeviceUnavailable(
        "edge-glm was installed without a C++ compiler, so that it has no kernels of its own; install g++ (or clang) "
        f"and run {_REINSTALL} again, {_OTHERWISE}"
    )


def _ask(library: Path) -> str:
    try:
        function = _load(library).edge_kernels_instructions
    except (OSError, AttributeError) as error:
        raise DeviceUnavailable(
            f"Edge-GLM's kernels do not load ({error}); run {_REINSTALL} to build them again, {_OTHERWISE}"
        ) from error
    function.restype = ctypes.c_char_p
    found: bytes = function()
    return found.decode("ascii")


def _load(library: Path) -> Any:
    return ctypes.CDLL(str(library))
