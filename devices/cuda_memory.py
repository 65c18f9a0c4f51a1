"""Memory of an NVIDIA GPU, through the CUDA runtime that ONNX Runtime's CUDA build brings or finds.

A handful of calls of ``libcudart`` through ctypes: ONNX Runtime binds device addresses but cannot copy between parts
of its buffers, and no other package is needed.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import sys
import weakref
from typing import Any

import numpy as np
from numpy.typing import NDArray

from devices.errors import DeviceUnavailable, EngineError
from devices.host import Memory

_KIND = 4  # cudaMemcpyDefault: the addresses tell the direction
_NON_BLOCKING = 1
_NAME_BYTES = 256
_PROPERTIES_BYTES = 8192
"""More than cudaDeviceProp has in any version; it begins with the name."""


def load_cuda_runtime() -> ctypes.CDLL:
    """``libcudart`` of the version ONNX Runtime was built for. DeviceUnavailable if it is not to be found."""
    import onnxruntime

    major = str(getattr(onnxruntime, "cuda_version", "") or "").split(".")[0]
    if not major:
        raise DeviceUnavailable(
            "this onnxruntime has no CUDA; install onnxruntime-gpu in place of onnxruntime, or use --device cpu"
        )
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):  # it reports by printing
        onnxruntime.preload_dlls()
    name = f"cudart64_{major}.dll" if sys.platform == "win32" else f"libcudart.so.{major}"
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        raise DeviceUnavailable(
            f"CUDA {major} is not installed ({error}); pip install 'onnxruntime-gpu[cuda,cudnn]', or use --device cpu"
        ) from error


class CudaRuntime:
    """Device 0: its memory and one stream. Every failure is an EngineError that names the call."""

    def __init__(self) -> None:
        """DeviceUnavailable if there is no CUDA runtime, driver or GPU."""
        self._library = load_cuda_runtime()
        self._library.cudaGetErrorString.restype = ctypes.c_char_p
        count = ctypes.c_int()
        code = self._library.cudaGetDeviceCount(ctypes.byref(count))
        if code or not count.value:
            reason = self._text(code) if code else "none is listed"
            raise DeviceUnavailable(f"no NVIDIA GPU can be used here ({reason}); check nvidia-smi, or use --device cpu")

    @property
    def product(self) -> str:
        """The GPU's name."""
        properties = ctypes.create_string_buffer(_PROPERTIES_BYTES)
        for function in ("cudaGetDeviceProperties", "cudaGetDeviceProperties_v2"):
            if hasattr(self._library, function):
                self._call(function, properties, 0)
                return properties.raw[:_NAME_BYTES].split(b"\0")[0].decode("utf-8", "replace")
        return "NVIDIA GPU"

    def new_stream(self) -> int:
        stream = ctypes.c_void_p()
        self._call("cudaStreamCreateWithFlags", ctypes.byref(stream), _NON_BLOCKING)
        return stream.value or 0

    def close_stream(self, stream: int) -> None:
        self._call("cudaStreamDestroy", ctypes.c_void_p(stream))

    def synchronize(self, stream: int) -> None:
        """Wait until everything given to ``stream`` is done."""
        self._call("cudaStreamSynchronize", ctypes.c_void_p(stream))

    @property
    def version(self) -> str:
        """Of the runtime library."""
        return self._version("cudaRuntimeGetVersion")

    @property
    def driver_version(self) -> str:
        """The newest CUDA that the driver takes."""
        return self._version("cudaDriverGetVersion")

    def _version(self, function: str) -> str:
        number = ctypes.c_int()
        self._call(function, ctypes.byref(number))
        return f"{number.value // 1000}.{number.value % 1000 // 10}"

    def memory(self) -> Memory:
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return Memory(total.value, free.value)

    def allocate(self, size: int) -> DeviceMemory:
        """``size`` bytes of zeros on the device. EngineError, with what is free, if they cannot be had."""
        address = ctypes.c_void_p()
        code = self._library.cudaMalloc(ctypes.byref(address), ctypes.c_size_t(size))
        if code:
            self._library.cudaGetLastError()  # or the next call reports it again
            raise EngineError(
                f"{size} bytes of GPU memory cannot be had, {self.memory().free} are free ({self._text(code)}); lower "
                "kv_tokens or max_sequences"
            )
        memory = DeviceMemory(self, address.value or 0)
        self._call("cudaMemset", address, 0, ctypes.c_size_t(size))
        return memory

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """An array in host memory that the device reads and writes directly; freed when the array is forgotten."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        address = ctypes.c_void_p()
        self._call("cudaMallocHost", ctypes.byref(address), ctypes.c_size_t(max(size, 1)))
        buffer = (ctypes.c_byte * size).from_address(address.value or 0)
        weakref.finalize(buffer, self._library.cudaFreeHost, ctypes.c_void_p(address.value))
        return np.frombuffer(buffer, dtype).reshape(shape)

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        """``size`` bytes between any two addresses, after what ``stream`` was given before."""
        self._call(
            "cudaMemcpyAsync",
            ctypes.c_void_p(target),
            ctypes.c_void_p(source),
            ctypes.c_size_t(size),
            _KIND,
            ctypes.c_void_p(stream),
        )

    def copy_rows(
        self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, rows: int, stream: int
    ) -> None:
        """``rows`` pieces of ``width`` bytes, each ``pitch`` bytes after the one before."""
        self._call(
            "cudaMemcpy2DAsync",
            ctypes.c_void_p(target),
            ctypes.c_size_t(target_pitch),
            ctypes.c_void_p(source),
            ctypes.c_size_t(source_pitch),
            ctypes.c_size_t(width),
            ctypes.c_size_t(rows),
            _KIND,
            ctypes.c_void_p(stream),
        )

    def free(self, address: int) -> None:
        self._call("cudaFree", ctypes.c_void_p(address))

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            raise EngineError(f"{name} failed in CUDA: {self._text(code)}")

    def _text(self, code: int) -> str:
        return str(self._library.cudaGetErrorString(code).decode())


class DeviceMemory:
    """A piece of device memory."""

    def __init__(self, runtime: CudaRuntime, address: int) -> None:
        self._runtime = runtime
        self.address = address

    def free(self) -> None:
        """Give it back. Idempotent."""
        if self.address:
            address, self.address = self.address, 0
            self._runtime.free(address)
