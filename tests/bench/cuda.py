"""Correctness and speed of the CUDA decoder on an NVIDIA GPU, as shares of what the GPU was measured to do.

    python -m tests.bench.cuda [--gguf SmolLM2-135M-Instruct.Q4_1.gguf] [--model glm-edge-1.5b] [--weights fp16 int8 …]

Needs onnxruntime-gpu; PyTorch, if it is there, measures the GPU's own limits (a plain copy, a float16 matrix product).
Weights are random, which changes no time. ``--gguf``: also the loss against Transformers' fp32 logits.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from devices import Decoder, DecoderOptions, DecoderSequence, Step, open_decoder
from devices.cuda_memory import CudaRuntime
from exporters.architecture import Architecture
from exporters.checkpoint import Checkpoint, TextFiles
from exporters.families import architecture
from exporters.formats import open_checkpoint
from exporters.graphs import Engine, write_graph
from exporters.hf_names import tensor_shape
from exporters.network import tensor_names
from exporters.onnx_operators import WeightFormat
from exporters.quantize import QuantizedCheckpoint
from exporters.synthetic import CONFIGS
from exporters.weights import QuantizedTensor, Tensor
from tests.bench.fidelity import TEXTS, all_logits, measure_loss
from tests.decoder_spec import decoder_spec

GROUP = 32
CONTEXT = 512
NEW = 96
CHUNK = 512
"""Tokens of a prefill step."""


class TiledCheckpoint:
    """Real shapes, one small piece of random numbers over and over: made in seconds.

    ``weights`` int4: codes with fractional zero points, as GGUF's Q4_1 has them, and an 8-bit embedding and head;
    with ``whole`` zero points that are codes, as our own quantization gives. int8: 8-bit codes.
    """

    provenance: dict[str, Any] = {"source": "random"}  # noqa: RUF012 - the protocol's type
    text = TextFiles("{}")

    def __init__(self, name: str, weights: WeightFormat, whole: bool = False) -> None:
        self._whole = whole
        self.architecture: Architecture = architecture(CONFIGS[name])
        self._weights = weights
        self._piece = np.random.default_rng(0).standard_normal(1 << 20).astype(np.float32)

    def tensor(self, name: str) -> Tensor:
        shape = tensor_shape(self.architecture, name)
        if len(shape) == 1:
            return np.full(shape, float(name.endswith("norm")), np.float32)
        if self._weights == "fp16":
            return np.resize(np.roll(self._piece, zlib.crc32(name.encode())) / shape[1] ** 0.5, shape)
        bits = 8 if self._weights == "int8" or name in ("embed", "head") else 4
        middle, groups = 2 ** (bits - 1), (shape[0], shape[1] // GROUP)
        codes = np.resize(np.clip(np.rint(self._piece * middle / 4 + middle), 0, 2 * middle - 1), shape)
        zero = np.resize(middle + 0.3 * self._piece[:997] * (bits == 4), groups).astype(np.float32)
        scale = np.full(groups, 4 / middle / shape[1] ** 0.5, np.float32)
        return QuantizedTensor(codes.astype(np.uint8), scale, np.rint(zero) if self._whole else zero, bits)


@dataclass(frozen=True)
class Limits:
    """Of the GPU, as PyTorch reaches them."""

    bytes_per_second: float
    operations_per_second: float


def measure_gpu() -> Limits:
    import torch

    event: Any = torch.cuda.Event

    def seconds(run: Callable[[], Any], times: int = 20) -> float:
        start, end = event(enable_timing=True), event(enable_timing=True)
        run()
        start.record()
        for _ in range(times):
            run()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / times / 1e3

    source = torch.empty(1 << 32, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copied = 2 * source.numel() / seconds(lambda: target.copy_(source))
    matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.float16)
    product = 2 * 8192**3 / seconds(lambda: matrix @ matrix)
    torch.cuda.empty_cache()
    return Limits(copied, product)


def open_on(
    device: str,
    export: Engine,
    checkpoint: Checkpoint,
    weights: WeightFormat,
    folder: Path,
    *,
    context: int | None = None,
    **options: Any,
) -> Decoder:
    """Written into ``folder``. ``context``: the model's, at most."""
    arch = checkpoint.architecture
    engine, file = write_graph(checkpoint, export, weights, folder, folder.parent)
    spec = decoder_spec(arch, engine, folder / file, context)
    return open_decoder(spec, device, DecoderOptions(**options))


def open_cuda(checkpoint: Checkpoint, weights: WeightFormat, folder: Path, **options: Any) -> Decoder:
    return open_on("onnxruntime:cuda", "onnx-cuda", checkpoint, weights, folder, **options)


def prefilled(decoder: Decoder, count: int, length: int) -> list[DecoderSequence]:
    rng = np.random.default_rng(1)
    sequences = [decoder.new_sequence() for _ in range(count)]
    for sequence in sequences:
        ids, chunk = rng.integers(0, 30000, length), decoder.limits.prefill_chunk
        for start in range(0, length, chunk):
            decoder.forward([Step(sequence, ids[start : start + chunk])])
    return sequences


def decode_seconds(decoder: Decoder, streams: int) -> tuple[float, float]:
    """Median seconds of a step of so many streams with :data:`CONTEXT` tokens each: all, and within the engine."""
    sequences = prefilled(decoder, streams, CONTEXT)
    steps, inside = [], []
    for token in range(NEW):
        batch = [Step(sequence, np.array([100 + token])) for sequence in sequences]
        before, started = decoder.engine_seconds, time.perf_counter()
        decoder.forward(batch)
        steps.append(time.perf_counter() - started)
        inside.append(decoder.engine_seconds - before)
    for sequence in sequences:
        sequence.close()
    return statistics.median(steps[8:]), statistics.median(inside[8:])


def prefill_seconds(decoder: Decoder, length: int) -> float:
    times = []
    for _ in range(6):
        started = time.perf_counter()
        (sequence,) = prefilled(decoder, 1, length)
        times.append(time.perf_counter() - started)
        sequence.close()
    return statistics.median(times[2:])


def read_bytes(checkpoint: Checkpoint, weights: WeightFormat) -> float:
    """Of weights and KV cache for one token of one stream; the embedding is only looked up in."""
    arch = checkpoint.architecture
    per_weight = {"fp16": 2.0, "int8": 1 + 2 / GROUP, "int4": 0.5 + 2.5 / GROUP}[weights]
    layers = sum(
        float(np.prod(tensor_shape(arch, name))) for name in tensor_names(arch) if name not in ("embed", "head")
    )
    head = arch.vocab_size * arch.hidden_size * (2.0 if weights == "fp16" else 1 + 2 / GROUP)
    return layers * per_weight + head + 2 * arch.num_layers * arch.num_kv_heads * arch.head_dim * 2 * CONTEXT


def prefill_operations(checkpoint: Checkpoint, length: int) -> float:
    arch = checkpoint.architecture
    matrices = sum(
        float(np.prod(tensor_shape(arch, name))) for name in tensor_names(arch) if name not in ("embed", "head")
    )
    return 2 * matrices * length + 2 * arch.num_layers * arch.num_heads * arch.head_dim * length**2


def measure_speed(
    name: str, weights: WeightFormat, limits: Limits | None, whole: bool = False, **options: Any
) -> dict[str, Any]:
    checkpoint = TiledCheckpoint(name, weights, whole)
    row: dict[str, Any] = {"model": name, "weights": weights + ", whole zero points" * whole}
    with tempfile.TemporaryDirectory() as scratch:
        runtime, started = CudaRuntime(), time.perf_counter()
        free = runtime.memory().free
        decoder = open_cuda(
            checkpoint,
            weights,
            Path(scratch) / "model",
            max_sequences=16,
            prefill_chunk=CHUNK,
            kv_tokens=16 * 1024,
            **options,
        )
        row["file_mb"] = sum(file.stat().st_size for file in (Path(scratch) / "model").iterdir()) // 10**6
        row["export_and_load_s"] = round(time.perf_counter() - started, 1)
    for streams in (1, 4, 16):
        step, inside = decode_seconds(decoder, streams)
        row[f"decode_{streams}_tps"] = round(streams / step, 1)
        row[f"decode_{streams}_ms"] = (round(step * 1e3, 3), round(inside * 1e3, 3))
        if streams == 1 and limits:
            share = read_bytes(checkpoint, weights) / limits.bytes_per_second / step
            row["decode_share_of_bandwidth"] = round(share, 3)
    for length in (512, 2048):
        seconds = prefill_seconds(decoder, length)
        row[f"prefill_{length}_tps"] = round(length / seconds)
        if limits:
            share = prefill_operations(checkpoint, length) / limits.operations_per_second / seconds
            row[f"prefill_{length}_share_of_matmul"] = round(share, 3)
    row["kv_mb"] = decoder.limits.kv_tokens * decoder.limits.kv_bytes_per_token // 10**6
    row["gpu_mb"] = (free - runtime.memory().free) // 10**6
    decoder.close()
    return row


def measure_gguf(gguf: Path, weights: WeightFormat) -> dict[str, Any]:
    row: dict[str, Any] = {"model": gguf.name, "weights": weights}
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = QuantizedCheckpoint(open_checkpoint(gguf), weights)
        decoder = open_cuda(
            checkpoint, weights, Path(scratch) / "model", max_sequences=8, prefill_chunk=CHUNK, kv_tokens=8 * 1024
        )
    for text in TEXTS:

        def run(ids: NDArray[np.int64]) -> NDArray[np.float32]:
            return all_logits(decoder, ids)

        loss = measure_loss(run, text)
        row[text] = f"{loss.excess:+.3%} {loss.top1:.2%}"
    for streams in (1, 8):
        row[f"decode_{streams}_tps"] = round(streams / decode_seconds(decoder, streams)[0], 1)
    row["prefill_512_tps"] = round(512 / prefill_seconds(decoder, 512))
    decoder.close()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--model", default="glm-edge-1.5b", choices=sorted(CONFIGS))
    parser.add_argument("--weights", nargs="*", default=["fp16", "int8", "int4"])
    parser.add_argument("--property", action="append", default=[], help="NAME=VALUE for the session or the provider")
    args = parser.parse_args()
    properties = dict(pair.split("=", 1) for pair in args.property)
    try:
        limits = measure_gpu()
        print(f"copy {limits.bytes_per_second / 1e12:.2f} TB/s, product {limits.operations_per_second / 1e12:.0f} T/s")
    except ImportError:
        limits = None
    if args.gguf is not None:
        for weights in args.weights:
            print(json.dumps(measure_gguf(args.gguf, weights)), flush=True)
    for weights in args.weights:
        for whole in (False, True) if weights == "int4" else (False,):
            row = measure_speed(args.model, weights, limits, whole, properties=properties)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
