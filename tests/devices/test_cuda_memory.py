"""Blocks and inputs on the GPU, over host memory; and what is said where there is no CUDA."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from devices.cuda_inputs import StepInputs
from devices.cuda_kv import CudaBlocks
from devices.cuda_memory import CudaRuntime
from devices.errors import DeviceUnavailable
from devices.paged_decoder import Part
from tests.devices.host_runtime import HostRuntime

BLOCK = (4, 2, 8)


def make_blocks() -> tuple[CudaBlocks, NDArray[np.float16]]:
    """Two layers' caches of five blocks, and the memory behind them."""
    runtime = HostRuntime()
    blocks = CudaBlocks(runtime, 0, 4, 5, BLOCK, np.dtype(np.float16))  # type: ignore[arg-type]  # a stand-in runtime
    memory = runtime.allocated[0].array.view(np.float16).reshape(4, 5, *BLOCK)
    memory[:] = np.random.default_rng(0).standard_normal(memory.shape)
    return blocks, memory


def test_addresses_and_sizes() -> None:
    blocks, memory = make_blocks()
    assert blocks.shape == (5, *BLOCK)
    assert blocks.block_bytes == 4 * 4 * 2 * 8 * 2
    for buffer in range(4):
        assert blocks.address(buffer) == memory[buffer].ctypes.data


def test_a_block_is_copied_in_every_layer_and_nothing_else() -> None:
    blocks, memory = make_blocks()
    before = memory.copy()
    blocks.copy(1, 3)
    before[:, 3] = before[:, 1]
    assert np.array_equal(memory, before)


@pytest.mark.parametrize("length", [1, 4, 6, 8])
def test_read_and_write_are_the_tokens_in_order(length: int) -> None:
    blocks, memory = make_blocks()
    table = [4, 0][: -(-length // 4)]
    arrays = blocks.read(table, length)
    for buffer, array in enumerate(arrays):
        assert array.shape == blocks.form(length)[0][0]
        assert np.array_equal(array, memory[buffer, table].reshape(-1, 2, 8)[:length])
    memory[:, table] = 0
    untouched = memory.copy()
    blocks.write(table, arrays)
    for buffer, array in enumerate(arrays):
        assert np.array_equal(memory[buffer, table].reshape(-1, 2, 8)[:length], array)
        assert not memory[buffer, table].reshape(-1, 2, 8)[length:].any()
    others = [block for block in range(5) if block not in table]
    assert np.array_equal(memory[:, others], untouched[:, others])


def bound(address: int, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """What a kernel would see."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_byte * size).from_address(address), dtype).reshape(shape)


@pytest.mark.parametrize("positions", [False, True])
def test_inputs_of_a_mixed_batch(positions: bool) -> None:
    inputs = StepInputs(HostRuntime(), 0, 16, 4, 3, positions)  # type: ignore[arg-type]
    parts = [
        Part(np.array([5, 6, 7]), 0, 100, [2], rows=2),
        Part(np.array([8]), 9, 9, [1, 0, 3], rows=0),
        Part(np.array([9, 10]), 4, 4, [5, 4], rows=1),
    ]
    for _ in range(2):  # the second time over what the first left
        seen = {name: bound(*where).tolist() for name, where in inputs.write(parts).items()}
    expected: dict[str, Any] = {
        "input_ids": [5, 6, 7, 8, 9, 10],
        "cumulative_sequence_length": [0, 3, 4, 6],
        "past_seqlens": [0, 9, 4],
        "block_table": [[2, 0, 0], [1, 0, 3], [5, 4, 0]],
        "row_index": [1, 2, 5],
    }
    if positions:
        expected["position_ids"] = [[100, 101, 102, 9, 4, 5]]
    assert seen == expected
    starts = [address for address, _, _ in inputs.write(parts).values()]
    assert len({start % 256 for start in starts}) == 1  # aligned alike, as the allocation is


def test_inputs_always_ask_for_a_row() -> None:
    inputs = StepInputs(HostRuntime(), 0, 16, 4, 3, positions=False)  # type: ignore[arg-type]
    written = inputs.write([Part(np.array([5, 6]), 0, 0, [2], rows=0)])
    assert bound(*written["row_index"]).tolist() == [0]


def test_addresses_do_not_change_with_the_batch() -> None:
    inputs = StepInputs(HostRuntime(), 0, 16, 4, 3, positions=False)  # type: ignore[arg-type]
    one = inputs.write([Part(np.array([5]), 0, 0, [2], rows=1)])
    two = inputs.write([Part(np.array([5, 6]), 0, 0, [2], rows=1), Part(np.array([5]), 0, 0, [1], rows=1)])
    assert {name: where[0] for name, where in one.items()} == {name: where[0] for name, where in two.items()}


def test_an_onnxruntime_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "cuda_version", "", raising=False)
    with pytest.raises(DeviceUnavailable, match=r"has no CUDA; install onnxruntime-gpu .*--device cpu"):
        CudaRuntime()


def test_cuda_is_not_installed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "cuda_version", "99.1", raising=False)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: print("Failed to load"), raising=False)
    with pytest.raises(DeviceUnavailable, match=r"CUDA 99 is not installed .*--device cpu"):
        CudaRuntime()
    assert capsys.readouterr().out == ""


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        """CUDA without a driver."""

        @staticmethod
        def cudaGetDeviceCount(count: object) -> int:
            return 35

        @staticmethod
        def cudaGetErrorString(code: int) -> bytes:
            return b"no driver"

    monkeypatch.setattr("devices.cuda_memory.load_cuda_runtime", Library)
    with pytest.raises(DeviceUnavailable, match=r"no NVIDIA GPU can be used here \(no driver\); check nvidia-smi"):
        CudaRuntime()
