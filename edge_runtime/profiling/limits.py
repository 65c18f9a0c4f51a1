"""What this machine does at most, for the two roofs of Williams, Waterman and Patterson (*Roofline*, CACM 52(4), 2009).

Every operator needs bytes from memory and operations of the processor; what it takes at least is the longer of both at
these rates. Measured in about a second, by all cores that this process may use.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from devices.edge_kernels import peak_rate
from devices.errors import DeviceUnavailable
from devices.host import cores, host_memory
from edge_runtime.profiling.result import Limits

READ_BYTES = 512 << 20
"""At most; far more than caches hold."""
LEAST_READ_BYTES = 64 << 20
"""Of less, caches would give too much."""
_FREE_SHARE = 4
"""What is taken of the memory that is free: one part in so many."""
_ROUNDS = 7
_SIDE = 1024
"""Of the matrices: large enough that a product is all arithmetic."""
_PRODUCTS_S = 0.3


def measure_limits(most: int) -> Limits:
    """``most``: bytes to take while measuring."""
    try:
        integer: float | None = peak_rate(cores(), floats=False)
        floats = peak_rate(cores(), floats=True)
    except DeviceUnavailable:
        integer, floats = None, float_rate()
    room = min(host_memory().free // _FREE_SHARE, most)
    return Limits(None if room < LEAST_READ_BYTES else max(read_rates(min(room, READ_BYTES))), floats, integer)


def higher(one: Limits, two: Limits) -> Limits:
    """Of two measurements: a limit is what was reached at best."""
    return Limits(
        _higher(one.bytes, two.bytes),
        max(one.float_operations, two.float_operations),
        _higher(one.integer_operations, two.integer_operations),
    )


def _higher(*rates: float | None) -> float | None:
    return max((rate for rate in rates if rate is not None), default=None)


def read_rates(nbytes: int = READ_BYTES) -> list[float]:
    """Bytes per second that all cores together read, of several rounds over ``nbytes``."""
    count = cores()
    arrays = [np.ones(nbytes // count // 4, np.float32) for _ in range(count)]
    rates = []
    with ThreadPoolExecutor(count) as pool:
        ready = threading.Barrier(count + 1)

        def read(array: np.ndarray[tuple[int], np.dtype[np.float32]]) -> None:
            ready.wait()
            np.dot(array, array)

        for _ in range(_ROUNDS):
            reading = [pool.submit(read, array) for array in arrays]
            started = time.perf_counter()
            ready.wait()
            for each in reading:
                each.result()
            rates.append(sum(array.nbytes for array in arrays) / (time.perf_counter() - started))
    return rates


def float_rate() -> float:
    """Products and sums per second in a product of float32 matrices by numpy's library: the best of several. Where
    there are no kernels of ours, the next best to what the processor can do."""
    matrix = np.ones((_SIDE, _SIDE), np.float32)
    best, end = 0.0, time.perf_counter() + _PRODUCTS_S
    while best == 0.0 or time.perf_counter() < end:
        started = time.perf_counter()
        np.matmul(matrix, matrix)
        best = max(best, 2 * _SIDE**3 / (time.perf_counter() - started))
    return best
